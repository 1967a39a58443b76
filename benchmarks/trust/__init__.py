"""The table of unreliable supervision: settings, features, methods, one run, and the report."""
