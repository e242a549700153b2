"""What a run will take, before it begins: steps, memory, time; the dry run."""
