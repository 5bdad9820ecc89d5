"""LightningModules for the tasks of the recipes."""
