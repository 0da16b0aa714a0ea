"""Errors, files, progress, GPUs, secrets and text of messages. Any package may import it; it imports none of ours."""
