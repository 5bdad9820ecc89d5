"""Models and adapters as GGUF files, which llama.cpp and the programs on it read."""
