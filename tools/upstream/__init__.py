"""Runs the public tests of Lightning and PEFT stock and with adapters, and compares the two."""
