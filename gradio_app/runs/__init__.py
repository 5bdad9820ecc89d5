"""Runs: store, executors, queue, and readers of run files."""
