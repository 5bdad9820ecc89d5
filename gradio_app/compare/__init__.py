"""Comparison of runs: differences in recipes and results."""
