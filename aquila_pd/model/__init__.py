"""The parts of a Paddle model around the decoder: KV cache, loading and saving, generate()."""
