"""Chat with trained models: one model process, its answers, and votes. No Gradio here."""
