"""Writes model folders, for this project and for other programs."""
