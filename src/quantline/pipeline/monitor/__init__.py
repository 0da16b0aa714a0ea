"""Processor, memory and GPU use of a stage while it runs."""
