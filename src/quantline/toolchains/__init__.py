"""Locked environments, the protocol between interpreters, and the runner of worker jobs."""
