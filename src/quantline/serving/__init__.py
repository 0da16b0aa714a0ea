"""The inference server: what it can load, how it starts, and requests to it."""
