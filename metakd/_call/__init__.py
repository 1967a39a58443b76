"""The stations of one call, from the arguments to the weight model's step, and what puts everything back."""
