"""Runs: where they are kept, how they are started, and what they have to say."""
