"""Exports of a run's adapters to other formats."""
