"""The table of runs: purpose, outcome, search and filters."""
