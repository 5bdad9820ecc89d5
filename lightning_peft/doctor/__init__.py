"""Checks of the environment by real operations instead of version tables."""
