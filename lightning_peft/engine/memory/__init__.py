"""Less memory: optimizers, activations that are not kept, bases quantized while they load."""
