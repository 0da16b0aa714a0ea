"""What runs beside torch and transformers in the reference environment."""
