"""A model's files from a hub."""
