"""Tasks, run by lm-evaluation-harness."""
