"""Models and texts that come in: hub, download, tokenizer, calibration, evaluation windows."""
