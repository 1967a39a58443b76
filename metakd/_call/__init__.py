"""The stations of one call in order, from the arguments to the weight model's step, and the rollback."""
