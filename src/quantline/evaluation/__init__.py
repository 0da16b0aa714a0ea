"""What quantizing costs, compared with the float model: perplexity, divergence, tasks and speed."""
