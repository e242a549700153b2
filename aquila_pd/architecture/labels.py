"""The label of a position that no loss is taken at, as every loss of the base library and of torch has it."""

IGNORE_INDEX = -100
