"""Text around the engine, for chat, serving, data and evaluation: loading, prompts, text streams, answers."""
