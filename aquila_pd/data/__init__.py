"""Files of rows as packs of tokens: reading, normalizing, masking, packing. Knows no model and no framework."""
