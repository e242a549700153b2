"""What every part stands on: named errors, files, progress, consoles. Knows no model and no framework."""
