"""What the benchmarks share: cases, methods, measuring, and the record of a run."""
