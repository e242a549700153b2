"""File formats read and written byte for byte: safetensors, GGUF, torch zips and pickles, SentencePiece, NF4."""
