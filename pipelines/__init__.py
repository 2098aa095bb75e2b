"""Loads batches from a store during training and evaluation."""
