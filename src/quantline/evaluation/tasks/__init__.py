"""Tasks by lm-evaluation-harness."""
