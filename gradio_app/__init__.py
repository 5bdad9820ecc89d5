"""Gradio app: recipe editor and run viewer on top of the command line."""
