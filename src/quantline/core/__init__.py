"""Errors, files, progress, GPUs, secrets, words for messages. Imported by anybody; imports nothing of ours."""
