"""Writing a checkpoint: streaming copies, shards, journal, staging folder, manifest."""
