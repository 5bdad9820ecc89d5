"""Reading code bases that fine-tune with Lightning: what of them this package takes over."""
