"""Is the hypergradient right? Central finite differences in float64, and likely causes."""

from metakd.check.check_hypergradient import Check, check_hypergradient

__all__ = ["Check", "check_hypergradient"]
