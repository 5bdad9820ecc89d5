"""The run folder: what the command line writes and other programs read."""
