"""OpenAI-compatible HTTP server on the continuous-batching engine: `aquila-pd serve`. Usage: docs/serving.md."""
