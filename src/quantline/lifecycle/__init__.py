"""What becomes of a variant afterwards: published, promoted, rebuilt, backed up, verified."""
