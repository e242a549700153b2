"""Supervised fine-tuning: from rows of conversations to a tuned model, in stages that one recipe describes."""
