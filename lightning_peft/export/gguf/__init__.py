"""GGUF export for llama.cpp."""
