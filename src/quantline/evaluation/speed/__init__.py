"""Speed compared with the float model, by vLLM's benchmark tools."""
