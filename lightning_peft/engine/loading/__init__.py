"""Loading of pretrained models: quantized during loading, or from the cache."""
