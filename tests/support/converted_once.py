"""Importing this converts a tiny model and throws it away: what is imported and cached on the way is there after it.

For a fork server: the first conversion of a process takes three times as long as the next.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import checkpoint_factory as factory

from aquila_pd.checkpoint.command import main

with tempfile.TemporaryDirectory() as made, contextlib.redirect_stdout(io.StringIO()):
    source = factory.write_safetensors(Path(made) / "source", factory.config(), factory.weights(factory.config()))
    factory.write_byte_tokenizer(source, bos="[CLS]", eos="</s>", pad="<|endoftext|>")
    assert main(["--input", str(source), "--output", str(Path(made) / "out")], framework="paddle") == 0
