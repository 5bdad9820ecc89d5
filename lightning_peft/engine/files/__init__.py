"""Checkpoints and adapter folders on disk."""
