"""pytorch_model.bin reader, single or sharded: without torch, and without executing pickled code.

Such a file is a zip, whose entries are found and checked in torch_zip.py; the pickle in it that describes the tensors
is read in formats/torch_pickle.py. Only files in the format before torch 1.6 need torch.
"""

import re
import threading
from pathlib import Path

import numpy as np

from ...architecture.families.dialect import Dialect
from ...formats import safetensors
from ...formats.dtypes import DTYPES, TORCH
from ...formats.torch_pickle import META, NOT_DENSE, UNFINISHED, Table, Tensor, WouldRunCode, kind_of, read_pickle
from ...formats.torch_zip import REPEATED, UNKNOWN_DTYPE, ZIPPED, Archive, Place, place
from ...utils.errors import CheckpointError, InstallationError, report, shown
from ...utils.files import lfs_pointer, why_not_a_file
from ..layout import BIN, BIN_INDEX, BIN_SHARDS, read_config
from .reader import ALL, Stored

PICKLED = b"\x80\x02"  # the format before torch 1.6
NAMING = safetensors.Naming(single=BIN, index=BIN_INDEX, pattern=BIN_SHARDS)
WRAPPER = "module"  # FlagAI saves {"module": state_dict}
ADVICE_OF_TORCH = re.compile(r"weights[_ ]only", re.IGNORECASE)
WOULD_RUN = re.compile(r"unsupported global|trying to (call|instantiate|load)", re.IGNORECASE)
SHOWN = 10  # values that are no tensors, of perhaps thousands


# ------------------------------------------------------------------------------------------ what both formats share


def _by_name(content: object, tensor_type: type, called: str) -> dict:
    """The tensors of a file by name, out of FlagAI's wrapper if they are in one."""
    for name, value in _pairs(content):
        if isinstance(name, str) and name == WRAPPER and isinstance(value, Table | dict):
            content = value
    others = [complaint for name, value in _pairs(content) if (complaint := _complaint(name, value, tensor_type))]
    if not isinstance(content, Table | dict):
        others = [f"it is a {kind_of(content)}"]
    if others:
        more = [f"{len(others) - SHOWN:,} more"] if len(others) > SHOWN else []
        raise CheckpointError(f"{called} does not hold tensors by name: {', '.join(others[:SHOWN] + more)}")
    return dict(_pairs(content))


def _complaint(name: object, value: object, tensor_type: type) -> str:
    if not isinstance(name, str):
        return f"a {kind_of(value)} goes by a {kind_of(name)}"
    if not isinstance(value, tensor_type):
        return f"'{shown(name)}' is a {kind_of(value)}"
    fine = name and name.isprintable() and len(name) <= safetensors.MAX_NAME  # as in safetensors
    return "" if fine else f"'{shown(name)}' is no name of a tensor"


def _pairs(content: object) -> list[tuple[object, object]]:
    if isinstance(content, Table):
        return content.pairs
    return list(content.items()) if isinstance(content, dict) else []


def _why(error: Exception) -> str:
    """An error of loading in one line; torch's own text proposes to load the file unsafely, which we never do."""
    lines = str(error).split("WeightsUnpickler error:")[-1].splitlines()
    found = next((line.strip() for line in lines if line.strip() and not ADVICE_OF_TORCH.search(line)), "")
    if isinstance(error, WouldRunCode) or WOULD_RUN.search(found):
        wanted = found.split(". Please")[0].split(" was not an allowed")[0]
        return f"would run code when loaded ({wanted}); it is refused. Ask its author for safetensors files"
    return f"is damaged or cut off ({type(error).__name__}: {found})"


def _tensors(archive: Archive) -> dict[str, Tensor]:
    order = archive.read("byteorder")
    if order not in (None, b"little"):
        advice = "Save it again on a machine with the byte order little"
        raise CheckpointError(f"{archive.path.name} has the byte order {order[:8]!r}, which is not read. {advice}")
    return _by_name(read_pickle(archive.read("data.pkl")), Tensor, archive.path.name)


# ------------------------------------------------------------------------------------------------- the format before


class _WholeFiles:
    """Files in the format before torch 1.6, which only torch reads: one at a time in memory, for any thread."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock = threading.Lock()
        self._held: tuple[str, dict] = ("", {})

    def tensors(self, file: str) -> dict:
        with self._lock:
            if self._held[0] != file:
                self._held = ("", {})  # before the next one comes
                self._held = (file, _load_whole(self._folder / file))
            return self._held[1]

    def read(self, file: str, name: str) -> np.ndarray:
        tensor = self.tensors(file)[name].detach()  # a parameter counts as one that wants a gradient
        if str(tensor.dtype) == "torch.bfloat16":  # numpy knows it only through its bits
            import torch

            return tensor.view(torch.int16).numpy().view(DTYPES["BF16"])
        return tensor.numpy()

    def close(self) -> None:
        with self._lock:
            self._held = ("", {})


def _load_whole(path: Path) -> dict:
    try:
        import torch
    except ImportError as error:
        raise InstallationError(
            f"{path} is in torch's format from before 1.6, which only torch can read, and torch is not installed.\n"
            f'Install it with pip install "aquila_pd[verify]", or convert the folder to safetensors elsewhere.'
        ) from error
    try:
        # weights_only refuses every pickle that would call anything but tensor building
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own kinds for each sort of damage
        raise CheckpointError(f"{path.name} {_why(error)}") from error
    return _by_name(content, torch.Tensor, path.name)


def _trouble(tensor) -> str:
    """What keeps a torch tensor from being read, if anything does."""
    if str(tensor.dtype) not in TORCH:
        return UNKNOWN_DTYPE.format(tensor.dtype)
    if tensor.is_meta:
        return META
    if str(tensor.layout) != "torch.strided":
        return NOT_DENSE.format(tensor.layout)
    size = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > size:
        return REPEATED.format(tensor.numel(), size)
    return UNFINISHED if tensor.is_neg() or tensor.is_conj() else ""


# -------------------------------------------------------------------------------------------------------- the reader


class TorchBinReader:
    """Memory-maps each tensor when it is read; tensors of files from before torch 1.6 are in memory."""

    dialect: Dialect | None = None  # the family's

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        self.notes: list[str] = []
        self._folder = folder
        self._places: dict[str, Place] = {}  # of the tensors that can be mapped
        self._whole_files = _WholeFiles(folder)
        self.stored = self._survey()

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        mapped = self._places.get(name)
        tensor = mapped.view() if mapped else self._whole_files.read(self.stored[name].file, name)
        return tensor[(*(rows, columns)[: tensor.ndim], ...)]  # with the dots a scalar stays an array

    def close(self) -> None:
        self._whole_files.close()  # every map closes with its array

    def _survey(self) -> dict[str, Stored]:
        """Name, dtype and shape of every tensor. Raises CheckpointError with all findings."""
        placed, findings = safetensors.read_placement(self._folder, NAMING)
        stored: dict[str, Stored] = {}
        for file in sorted(placed):
            try:
                held, troubles = self._look_into(self._folder / file)
            except CheckpointError as error:
                findings.append(str(error))
                continue
            findings += [f"{name} is in both {stored[name].file} and {file}" for name in held if name in stored]
            findings += safetensors.compare_with_index(file, set(held), placed[file], NAMING)
            findings += [f"{name} in {file} {trouble}" for name, trouble in troubles.items()]
            stored.update(held)
        if findings:
            advice = "Fetch the named files again, or compare the folder with its original."
            raise CheckpointError(report(f"{self._folder} is not a usable .bin checkpoint:", findings, advice))
        return stored

    def _look_into(self, path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
        """What a file holds, and by name what keeps a tensor from being read."""
        wrong = why_not_a_file(path)
        if wrong:
            raise CheckpointError(f"{path.name} {wrong}")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path.name} has zero bytes")
        pointer = lfs_pointer(path)
        if pointer:
            raise CheckpointError(pointer)
        with path.open("rb") as file:
            beginning = file.read(16)
        if beginning.startswith(ZIPPED):
            return self._look_into_zip(path)
        if beginning.startswith(PICKLED):
            return self._look_into_whole(path)
        raise CheckpointError(f"{path.name} is not a torch file: it begins with {beginning!r}. Fetch it again")

    def _look_into_zip(self, path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
        try:
            with Archive(path) as archive:
                tensors = _tensors(archive)
                found = {name: place(tensor, archive) for name, tensor in tensors.items()}
        except CheckpointError:
            raise
        except Exception as error:  # zipfile too has many kinds of errors for damage
            raise CheckpointError(f"{path.name} {_why(error)}") from error
        troubles = {name: trouble for name, trouble in found.items() if isinstance(trouble, str)}
        self._places.update((name, lies) for name, lies in found.items() if name not in troubles)
        held = {name: Stored(TORCH.get(t.dtype, ""), t.shape, path.name) for name, t in tensors.items()}
        return held, troubles

    def _look_into_whole(self, path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
        tensors = self._whole_files.tensors(path.name)
        troubles = {name: trouble for name, tensor in tensors.items() if (trouble := _trouble(tensor))}
        held = {n: Stored(TORCH.get(str(t.dtype), ""), tuple(t.shape), path.name) for n, t in tensors.items()}
        self.notes.append(
            f"{path.name} is in torch's format from before 1.6, which cannot be mapped: it is read into memory whole"
        )
        return held, troubles
