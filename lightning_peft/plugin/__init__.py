"""The only rooms that know Lightning: namespaces, the order of things, strategies, callbacks."""
