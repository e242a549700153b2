"""Training recipes: schema, YAML reader, findings, reference."""
