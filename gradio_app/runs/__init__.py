"""Runs: their store on disk, executors, the queue, and readers of their files."""
