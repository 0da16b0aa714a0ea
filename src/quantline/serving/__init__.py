"""The server: what it can load, starting it, asking it."""
