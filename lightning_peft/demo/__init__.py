"""The offline demo: a tiny base model, the text it read and the questions it is tuned on."""
