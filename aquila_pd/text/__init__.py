"""Text in and out of the engine: model loading, chat prompts, incremental detokenization. Shared by all its users."""
