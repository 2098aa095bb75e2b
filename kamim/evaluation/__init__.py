"""Evaluation of checkpoints: what their features are worth."""
