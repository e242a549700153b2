"""Supervised fine-tuning (full, LoRA, QLoRA) in the stages of one recipe."""
