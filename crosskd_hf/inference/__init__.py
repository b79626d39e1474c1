"""Trained detectors at work: loading, COCO evaluation, prediction, drawing."""
