"""GGUF, the file format of llama.cpp: its block types, its header, its names of tensors, and the mixtures of types."""
