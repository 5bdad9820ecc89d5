"""Exports of finished adapters: merged models, other formats and the hub."""
