"""What is written to disk and read back: checkpoints and adapter folders."""
