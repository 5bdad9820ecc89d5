"""Talking to what was trained: one model process, its answers, and votes on them; no Gradio."""
