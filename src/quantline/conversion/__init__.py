"""Conversion between weight layouts: `source` recognises, `plan` decides and refuses, `engine` writes, `proof` shows."""
