"""Quantization backends: one handler per storage format of frozen weights.

Nothing else in the package imports a quantization library or knows what a quantized parameter
consists of. ``docs/contributing.md`` shows how to add a backend.
"""
