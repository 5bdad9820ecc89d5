"""Loading pretrained models: quantized while they are read, and from the cache."""
