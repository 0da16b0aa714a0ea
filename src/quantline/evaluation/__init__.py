"""What quantizing costs: perplexity, divergence, tasks and speed beside the float model."""
