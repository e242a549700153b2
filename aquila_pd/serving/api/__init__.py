"""HTTP endpoints, one per module."""
