"""The same random weights as three folders: one for transformers, one for us, one for PaddleNLP's LLaMA."""

import shutil
import sys
from pathlib import Path

from harness import ROOT, random_folder, run
from load import as_paddlenlp_llama

KINDS = ("torch", "ours", "llama")
READY = ".ready"  # a file beside a folder, written last: an interrupted run leaves nothing that is taken for whole


def make_folder(work: Path, shape: str, kind: str, dtype: str = "float32") -> Path:
    """The folder of one of KINDS below work, with files in this dtype; made when it is not there."""
    folder = work / f"{shape}-{dtype}" / kind
    ready = folder.with_name(kind + READY)
    if ready.is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    # Each in a process of its own: a child's peak memory begins with its parent's.
    if kind == "torch":
        random_folder(folder, shape, dtype)
    elif kind == "ours":
        source = str(make_folder(work, shape, "torch", dtype))
        convert = [sys.executable, str(ROOT / "convert" / "torch2paddle.py"), "--input", source]
        run([*convert, "--output", str(folder), "--verify", "none"])
    else:
        run([sys.executable, __file__, str(make_folder(work, shape, "ours", dtype)), str(folder)])
    ready.touch()
    return folder


if __name__ == "__main__":
    as_paddlenlp_llama(Path(sys.argv[1]), Path(sys.argv[2]))
