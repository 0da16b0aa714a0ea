"""Check whether a configuration can work and what it needs, before anything is computed."""
