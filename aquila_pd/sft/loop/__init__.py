"""One stage of training: batches, loss, optimizer, schedule, checkpoints, the Trainer."""
