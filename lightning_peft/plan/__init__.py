"""Memory planning without loading or training a model."""
