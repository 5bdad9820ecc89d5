"""The table of runs: what each was for, what came of it, and which are listed."""
