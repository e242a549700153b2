"""Labels: the index that losses ignore, in the base library and in torch."""

IGNORE_INDEX = -100
