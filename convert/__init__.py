"""Commands of the converter: torch2paddle.py, paddle2torch.py, verify.py."""
