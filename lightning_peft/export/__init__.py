"""What becomes of a finished adapter: a merged model folder, other formats, a place on the hub."""
