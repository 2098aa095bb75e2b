"""Measurements: how faithful the cached keypoints are, how fast the loader is."""
