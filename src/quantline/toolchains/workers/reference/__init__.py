"""Workers of the `reference` environment, which has torch and transformers."""
