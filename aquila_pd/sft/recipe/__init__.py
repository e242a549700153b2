"""A training recipe: its schema, the YAML reader, the checks."""
