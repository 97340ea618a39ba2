"""One training run: checked, planned, executed, saved."""
