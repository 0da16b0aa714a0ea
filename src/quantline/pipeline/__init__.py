"""A variant's way through the stages: configuration, identity, records, lineage."""
