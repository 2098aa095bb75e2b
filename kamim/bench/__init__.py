"""Benchmarks: fidelity of cached keypoints and stored pixels; speed of preprocessing, loading, training, evaluation."""
