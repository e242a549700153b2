"""Converting checkpoints: convert.convert() is the engine, sources.open_source() reads any format.

Nothing here imports paddle or torch, except .bin sources and the verification of logits, when they are asked for.
"""
