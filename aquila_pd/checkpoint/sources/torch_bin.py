"""Weights of pytorch_model.bin files, single or sharded, loaded without running code from them."""

import re
from pathlib import Path
from pickle import UnpicklingError

import numpy as np

from ... import shards
from ...errors import CheckpointError, InstallationError, report
from ...families.dialect import Dialect
from ...files import lfs_pointer
from ..layout import BIN, BIN_INDEX, BIN_SHARDS, read_config
from .reader import Stored

ZIPPED = b"PK\x03\x04"  # torch's format since 1.6
PICKLED = b"\x80\x02"  # the format before
ADVICE_OF_TORCH = re.compile(r"weights[_ ]only", re.IGNORECASE)
WOULD_RUN = re.compile(r"unsupported global|trying to (call|instantiate|load)", re.IGNORECASE)
# A mapped page counts as ours once it was read, and numpy's view of a torch tensor gives no way to let go of it; a
# file opened anew does. Its list of tensors is read again then, which takes milliseconds.
REOPEN_AFTER = 256 * 2**20
NAMING = shards.Naming(single=BIN, index=BIN_INDEX, pattern=BIN_SHARDS)
WRAPPER = "module"  # FlagAI saves {"module": state_dict}
TAGS = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}
OTHER_TAGS = {"torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8"}


class TorchBinReader:
    """Keeps one file open at a time, mapped; its tensors are views into the map."""

    dialect: Dialect | None = None  # the family's

    def __init__(self, folder: Path):
        self._torch = _import_torch(folder)
        self.config = read_config(folder)
        self.notes: list[str] = []
        self._folder = folder
        self._open: tuple[str, dict] = ("", {})
        self._bytes_read = 0  # of the open file
        self.stored = self._survey()

    def read(self, name: str) -> np.ndarray:
        file = self.stored[name].file
        if self._bytes_read > REOPEN_AFTER and _is_zipped(self._folder / file):
            self.close()
        tensor = self._tensors(file)[name].detach().contiguous()  # a parameter counts as one that wants a gradient
        self._bytes_read += tensor.nbytes
        if tensor.dtype == self._torch.bfloat16:  # numpy knows it only through its bits
            return tensor.view(self._torch.int16).numpy().view(shards.DTYPES["BF16"])
        return tensor.numpy()

    def close(self) -> None:
        self._open = ("", {})
        self._bytes_read = 0

    def _survey(self) -> dict[str, Stored]:
        """Name, dtype and shape of every tensor. Raises CheckpointError with all findings."""
        placed, findings = shards.read_placement(self._folder, NAMING)
        stored: dict[str, Stored] = {}
        for file in sorted(placed):
            try:
                tensors = self._tensors(file)
            except CheckpointError as error:
                findings.append(str(error))
                continue
            findings += [f"{name} is in both {stored[name].file} and {file}" for name in tensors if name in stored]
            findings += shards.compare_with_index(file, set(tensors), placed[file], NAMING)
            for name, tensor in tensors.items():
                tag = {**TAGS, **OTHER_TAGS}.get(str(tensor.dtype))
                if tag is None:
                    findings.append(f"{name} in {file} has the dtype {tensor.dtype}; known are {', '.join(TAGS)}")
                if tensor.is_meta:
                    findings.append(f"{name} in {file} is on the device meta: it was saved without its values")
                elif tensor.layout != self._torch.strided:
                    findings.append(f"{name} in {file} has the layout {tensor.layout}; only dense tensors are read")
                stored[name] = Stored(tag or "", tuple(tensor.shape), file)
        if findings:
            advice = "Fetch the named files again, or compare the folder with its original."
            raise CheckpointError(report(f"{self._folder} is not a usable .bin checkpoint:", findings, advice))
        return stored

    def _tensors(self, file: str) -> dict:
        if self._open[0] != file:
            self.close()
            self._open = (file, self._load(file))
        return self._open[1]

    def _load(self, file: str) -> dict:
        path = self._folder / file
        if not path.is_file():
            raise CheckpointError(f"{file} does not exist")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{file} has zero bytes")
        pointer = lfs_pointer(path)
        if pointer:
            raise CheckpointError(pointer)
        try:
            content = self._load_mapped(path)
        except Exception as error:  # torch raises its own kinds for each sort of damage
            raise CheckpointError(f"{file} {_why(error, path)}") from error
        if isinstance(content, dict) and isinstance(content.get(WRAPPER), dict):
            content = content[WRAPPER]
        others = _not_tensors(content, self._torch.Tensor)
        if others:
            raise CheckpointError(f"{file} does not hold tensors by name: {others}")
        return content

    def _load_mapped(self, path: Path) -> dict:
        """weights_only refuses every pickle that would call anything but tensor building."""
        if _is_zipped(path):
            return self._torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        note = f"{path.name} is in torch's format from before 1.6, which cannot be mapped: it is read into memory whole"
        if note not in self.notes:
            self.notes.append(note)
        return self._torch.load(path, map_location="cpu", weights_only=True)


def _import_torch(folder: Path):
    try:
        import torch
    except ImportError as error:
        raise InstallationError(
            f"{folder} holds .bin files, which only torch can read, and torch is not installed.\nInstall it with "
            f'pip install "aquila_pd[verify]", or convert the folder to safetensors elsewhere.'
        ) from error
    return torch


def _is_zipped(path: Path) -> bool:
    return _beginning(path, len(ZIPPED)) == ZIPPED


def _beginning(path: Path, length: int) -> bytes:
    with path.open("rb") as file:
        return file.read(length)


def _why(error: Exception, path: Path) -> str:
    """A torch loading error in one line; its own text proposes to load the file unsafely, which we never do."""
    lines = str(error).split("WeightsUnpickler error:")[-1].splitlines()
    found = next((line.strip() for line in lines if line.strip() and not ADVICE_OF_TORCH.search(line)), "")
    if WOULD_RUN.search(found):
        wanted = found.split(". Please")[0].split(" was not an allowed")[0]
        return f"would run code when loaded ({wanted}); it is refused. Ask its author for safetensors files"
    if isinstance(error, UnpicklingError) and not _beginning(path, 4).startswith((ZIPPED, PICKLED)):
        return f"is not a torch file: it begins with {_beginning(path, 16)!r}. Fetch it again"
    return f"is damaged or cut off ({type(error).__name__}: {found})"


def _not_tensors(content: object, tensor_type: type) -> str:
    if not isinstance(content, dict):
        return f"it is a {type(content).__name__}"
    others = [
        f"{name!r} is a {type(value).__name__}"
        for name, value in content.items()
        if not _named(name, value, tensor_type)
    ]
    return ", ".join(others)


def _named(name: object, value: object, tensor_type: type) -> bool:
    return isinstance(name, str) and isinstance(value, tensor_type)
