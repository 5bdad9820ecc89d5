"""Proof, on the user's own module, that adapters do what they should."""
