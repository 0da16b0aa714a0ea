"""Conversion between weight layouts: `source` recognises, `plan` decides and refuses, `write` writes, `proof` proves."""
