"""Benchmarks of EleutherAI's lm-evaluation-harness on a base and its adapters."""
