"""Chat and batch generation: model.predict(), `aquila-pd chat` in a terminal, `aquila-pd generate` for JSONL files."""
