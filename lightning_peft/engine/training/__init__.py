"""What training needs besides adapters: optimizers, activation checkpointing, losses."""
