"""Comparison of runs: differences of their recipes and results."""
