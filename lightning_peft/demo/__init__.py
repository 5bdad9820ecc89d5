"""The offline demo: base model, training data and evaluation."""
