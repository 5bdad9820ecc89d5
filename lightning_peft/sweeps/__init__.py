"""Sweeps: runs of a recipe with different values of its settings."""
