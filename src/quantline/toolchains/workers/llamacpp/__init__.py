"""llama.cpp in its own environment: its library, its converter, quantizing a file, and its server."""
