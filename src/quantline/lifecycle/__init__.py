"""After the pipeline: publish, promote, rebuild, back up and verify variants."""
