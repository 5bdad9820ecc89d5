"""PEFT methods: one entry each, with layer classes for in-place ones.

``docs/contributing.md`` shows how to add one.
"""
