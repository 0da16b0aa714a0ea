"""Runs a variant through the stages: configuration, identity, records, lineage."""
