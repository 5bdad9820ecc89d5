"""The web page: a recipe editor and a viewer of run folders, next to the command line."""
