"""Measuring: what was measured where, and the share of time in which the GPU was busy."""
