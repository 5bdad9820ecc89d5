"""Runs beside each other: what differs in their recipes, and what came of it."""
