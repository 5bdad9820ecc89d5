"""Layers that carry adapters or quantized weights, and what such a layer computes."""
