"""Backbones, the masked image model, features of a block, and weights from elsewhere."""
