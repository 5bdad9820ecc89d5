"""PEFT's methods: one entry for each, and a class of layers for those that work in place.

``docs/contributing.md`` shows how to add one.
"""
