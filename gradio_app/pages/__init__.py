"""Pages: components, and event handlers that call the other packages."""
