"""The pages: each builds its components and binds handlers that call the other packages."""
