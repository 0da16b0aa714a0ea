"""From a result back to what it was made of, and where two chains part."""
