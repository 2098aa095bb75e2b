"""Online: store -> batches."""
