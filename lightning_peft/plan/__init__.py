"""What a method needs before anything is loaded or trained."""
