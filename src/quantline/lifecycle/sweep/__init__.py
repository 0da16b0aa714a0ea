"""Builds several variants at the same time, here or on other machines: `python -m stages.sweep`."""
