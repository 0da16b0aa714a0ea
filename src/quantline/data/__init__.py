"""Input models and texts: hub, download, tokenizer, calibration, evaluation windows."""
