"""Evaluates the features of checkpoints."""
