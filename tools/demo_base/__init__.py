"""Builds the base model and the data of ``lightning-peft demo``; not part of the wheel."""
