"""vLLM's benchmark tools, beside the float model."""
