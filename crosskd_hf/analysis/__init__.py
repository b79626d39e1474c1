"""The papers' figures, on any pair of dense detectors and any data: each is a picture and a csv file.

`crosskd-hf analyse conflict`, `targets`, `gradients`, `curves` and `crosskd-hf predict --nms`; see docs/figures.md.
"""
