"""What a machine needs for training, tried rather than looked up."""
