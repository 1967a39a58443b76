"""Any module as a pure function of its parameters, buffers, Python state and random numbers."""
