"""SFT data pipeline: parse, normalize, filter, deduplicate, tokenize with label masks, pack. No model, no framework."""
