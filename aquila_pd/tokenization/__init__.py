"""Tokenizer files and chat templates, without Paddle; aquila_pd.tokenizer is the interface on top."""
