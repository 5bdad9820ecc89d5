"""Selection of submodules and layers to adapt."""
