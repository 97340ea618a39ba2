"""From rows in files to batches for the GPU."""
