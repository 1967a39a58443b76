"""The long-tailed table: presets, methods, one cell's training, and the report."""
