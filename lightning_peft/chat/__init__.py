"""Chat with a base model and its adapters, one model in memory."""
