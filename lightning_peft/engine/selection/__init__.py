"""Which submodules and layers are meant, and what would go wrong with them."""
