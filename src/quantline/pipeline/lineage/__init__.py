"""The lineage of a result, and the first difference between two lineages."""
