"""What stands behind `CrossKDTrainer`: data loading, updates, optimisers, checkpoints, provenance."""
