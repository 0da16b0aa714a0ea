"""Locked environments, the protocol between interpreters, and how a job is run in another one."""
