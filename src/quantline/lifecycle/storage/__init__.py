"""DVC's cache and outputs."""
