"""What the models of this project share; each model has a package of its own, and none imports another."""
