"""Training loop of one stage: batches, loss, optimizer, schedule, checkpoints, the Trainer."""
