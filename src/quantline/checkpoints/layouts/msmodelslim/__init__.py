"""The three save formats of Ascend msModelSlim."""
