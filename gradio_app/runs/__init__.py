"""Runs: their store on disk, the processes that train, the line of those that wait, and reading."""
