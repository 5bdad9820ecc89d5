"""Recipes: forms that make them, checks of what visitors bring, and what is said of them."""
