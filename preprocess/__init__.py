"""Builds stores from source images, before training."""
