"""Model folders that other programs read."""
