"""Sweeps: the runs of a recipe with several values of some of its keys."""
