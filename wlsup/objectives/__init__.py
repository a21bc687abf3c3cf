"""The objectives: pure loss functions."""
