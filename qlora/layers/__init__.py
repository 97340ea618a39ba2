"""The layers of the model as they are trained and used in 4 bits."""
