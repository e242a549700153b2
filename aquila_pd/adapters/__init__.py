"""LoRA adapters: in a model, in peft's files, merged into a base."""
