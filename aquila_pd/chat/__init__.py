"""Talking to a model: templates applied, text streamed, predict, the terminal, batches of prompts."""
