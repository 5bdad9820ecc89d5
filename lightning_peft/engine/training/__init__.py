"""Optimizers, activation checkpointing and losses."""
