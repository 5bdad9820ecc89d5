"""Layers with adapters or quantized weights."""
