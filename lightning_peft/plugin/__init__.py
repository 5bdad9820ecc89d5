"""Lightning integration: strategies, callbacks and CLI."""
