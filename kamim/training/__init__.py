"""Pretraining: the loop, its configuration, checkpoints, metrics and callbacks."""
