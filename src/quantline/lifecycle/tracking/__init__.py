"""MLflow: publishing runs, reading them back, the model registry."""
