"""Quantization backends: one handler for each way to store frozen weights.

Nothing else in the package imports a quantization library or knows what a quantized parameter
consists of. ``docs/contributing.md`` shows how to add a backend.
"""
