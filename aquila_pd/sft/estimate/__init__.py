"""Estimates before a run: steps, FLOPs, memory, time; the dry run."""
