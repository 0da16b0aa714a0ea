"""What a configuration will need and whether it can work, before anything is computed."""
