"""Whole experiments: training one detector, comparing with and without a teacher, published recipes."""
