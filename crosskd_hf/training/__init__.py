"""What stands behind `CrossKDTrainer`: data loading, updates, checkpoints, provenance."""
