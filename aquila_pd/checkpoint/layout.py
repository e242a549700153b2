"""Detection of the checkpoint format at a path, by file names only; the sources read the content."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..formats import safetensors as shards
from ..utils import files
from ..utils.errors import CheckpointError, report

CONFIG = "config.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SHARDS = "pytorch_model-*-of-*.bin"
READ_BESIDE = (".json", ".jinja", ".model", "merges.txt")  # ends of the names that are read beside the weights


@dataclass(frozen=True)
class Layout:
    """kind: "safetensors", "torch_bin", "gguf" or "planned"; path: the folder, or the GGUF file; notes: choices."""

    kind: str
    path: Path
    notes: tuple[str, ...] = ()


def find_layout(path: Path, *, may_be_planned: bool = False) -> Layout:
    """The checkpoint at a path: a folder or a GGUF file. Raises CheckpointError when there is none, or several.

    may_be_planned: a folder with config.json and no weights at all counts as one that is still to be fetched.
    """
    path = Path(path)
    if path.is_file():
        return _gguf_file(path)
    if not path.is_dir():
        raise CheckpointError(f"There is no checkpoint at {path}: {_what(path)}. Give a folder or a GGUF file.")
    _check_kinds(path)
    safetensors = _has(path, shards.SHARDS, shards.SINGLE, shards.INDEX)
    torch_bin = _has(path, BIN_SHARDS, BIN, BIN_INDEX)
    if safetensors:
        notes = ("both .safetensors and .bin files are there; the .safetensors ones are read",) if torch_bin else ()
        return Layout("safetensors", path, notes)
    if torch_bin:
        return Layout("torch_bin", path)
    if _has(path, "*.pdparams"):
        raise CheckpointError(
            f"{path} holds PaddleNLP's .pdparams, a pickle, which is not read here. Load it once and save it anew:\n"
            f"  AquilaForCausalLM.from_pretrained({str(path)!r}).save_pretrained(NEW_FOLDER)  # from aquila_pd"
        )
    if may_be_planned and (path / CONFIG).is_file() and not _has(path, "*.gguf"):
        return Layout("planned", path)
    return _gguf_folder(path)


def _what(path: Path) -> str:
    return f"it {files.why_not_a_file(path)}" if os.path.lexists(path) else "no such file or folder"


def _check_kinds(folder: Path) -> None:
    """Raise CheckpointError for what has the name of a file that is read and is none: it would pass for absent."""
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(READ_BESIDE))
    findings = [f"{files.shown(name)} {wrong}" for name in names if (wrong := files.why_not_a_file(folder / name))]
    if findings:
        raise CheckpointError(report(f"{folder} cannot be read:", findings, "Fetch them from where the weights are."))


def _has(folder: Path, pattern: str, *names: str) -> bool:
    """Whether there is anything of these names; a link that leads nowhere counts, so that it is noticed."""
    return any(os.path.lexists(folder / name) for name in names) or next(folder.glob(pattern), None) is not None


def _gguf_file(path: Path) -> Layout:
    files.refuse_lfs_pointer(path, CheckpointError)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        found = f"begins with {magic!r}" if magic else "has zero bytes"
        raise CheckpointError(f"{path} is not a GGUF file: it {found}. Give a GGUF file or the folder of a checkpoint.")
    return Layout("gguf", path)


def _gguf_folder(folder: Path) -> Layout:
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1 and found[0].name.isprintable():  # no name is printed that would steer the terminal
        return _gguf_file(found[0])
    if found:
        names = ", ".join(files.shown(file.name) for file in found)
        raise CheckpointError(f"{folder} holds {len(found)} GGUF files: {names}. Give the one to convert by its path.")
    wanted = f"{shards.SINGLE}, {shards.INDEX}, {BIN}, {BIN_INDEX}, *.gguf"
    raise CheckpointError(f"{folder} holds no checkpoint: none of {wanted} is there. Is it the folder you meant?")


def read_config(folder: Path) -> dict:
    """The config.json of a checkpoint folder. Raises CheckpointError."""
    return read_json(folder / CONFIG)


def read_json(path: Path) -> dict:
    """The object in a JSON file of a checkpoint. Raises CheckpointError."""
    return files.read_object(path, CheckpointError)
