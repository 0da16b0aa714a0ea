"""The integer formats of compressed-tensors."""
