"""The web page: a recipe editor and a reader of run folders."""
