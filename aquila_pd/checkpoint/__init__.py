"""Checkpoint conversion: convert.convert() is the entry point, sources.open_source() reads any format.

Nothing here imports paddle or torch, except .bin sources and the verification of logits, when they are asked for.
"""
