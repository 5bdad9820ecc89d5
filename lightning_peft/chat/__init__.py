"""Talking to a base and its adapters, and comparing them: one model in memory for all."""
