"""An OpenAI-compatible HTTP server over the generation engine: `aquila-pd serve`. How it is used: docs/serving.md."""
