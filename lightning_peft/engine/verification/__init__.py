"""Verification of adapters on the user's module."""
