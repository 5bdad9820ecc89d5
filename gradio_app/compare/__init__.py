"""Comparison of runs: differences of their recipes, and outcomes."""
