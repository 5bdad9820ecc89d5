"""Adapters of a run in the forms in which others take them."""
