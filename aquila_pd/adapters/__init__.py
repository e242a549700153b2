"""LoRA adapters: layers, peft's files, merging into a base."""
