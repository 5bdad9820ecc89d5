"""Recipes: forms, validation of visitors' input, and summaries."""
