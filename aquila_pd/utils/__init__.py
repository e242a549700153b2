"""Base layer: named errors, files, units, cores, progress, consoles, command exit. No model, no framework."""
