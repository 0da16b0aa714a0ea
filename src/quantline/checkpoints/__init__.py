"""A model on disk: safetensors, config.json, linears, and every weight layout. NumPy only."""
