"""Backbones, the masked image model, features of a block, and weights of other projects."""
