"""Code that runs in the environments of `envs/`, started by name; nobody imports it."""
