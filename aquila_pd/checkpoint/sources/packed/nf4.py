"""bitsandbytes NF4: 4-bit codes in blocks, each block with its largest magnitude, which may be packed in 8 bits itself.

The weight is torch's [out, in] laid out flat, two codes to a byte, the first in the high half. The sixteen values are
read from the file. Double quantization keeps the magnitudes, less an offset, as codes of 256 values in larger blocks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ....formats import safetensors
from ....utils.errors import shown, shown_value
from ....utils.files import JSON_ERRORS, parse_json
from ..reader import Reader, Stored
from . import survey
from .settings import Said
from .survey import Survey, bounds

KINDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE = "quant_state.bitsandbytes__nf4"
OTHER_STATES = ("quant_state.bitsandbytes__fp4",)
NESTED = KINDS[2:]
TABLES = ("quant_map", "nested_quant_map")
HELD = {*TABLES, *NESTED}  # in memory: small, and used for every part
CODES = 16
NESTED_CODES = 256
BLOCKSIZES = tuple(2**n for n in range(5, 13))  # 32 to 4096, those that quantize_4bit of bitsandbytes 0.50 takes
MAX_STATE = 4096  # bytes of the description of a tensor; real ones have 200
MAX_BRACKETS = 16  # in it; real ones have two pairs
MAX_FLOAT = float(np.finfo(np.float32).max)
AT_ONCE = 2**17  # values; their bytes, indices and floats fit a processor's second cache
KNOWN = {
    "load_in_4bit": (True,),
    "load_in_8bit": (False,),
    "_load_in_4bit": (True,),
    "_load_in_8bit": (False,),
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_quant_storage": ("uint8",),
    "bnb_4bit_use_double_quant": (True, False),
}
# what else BitsAndBytesConfig holds: of 8-bit loading, or of the arithmetic after unpacking
IGNORED = {
    *("quant_method", "bnb_4bit_compute_dtype", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
    *("llm_int8_skip_modules", "llm_int8_threshold", "modules_to_not_convert"),
}


@dataclass(frozen=True)
class Nested:
    """Magnitudes as codes: table[code] * scale of its block + offset, all float32."""

    table: np.ndarray  # [256]
    scales: np.ndarray  # [blocks of blocks]
    blocksize: int
    offset: np.float32

    def unpack(self, codes: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Magnitudes of codes whose places among all codes are `index`, of the same shape."""
        return self.table[codes] * self.scales[index // self.blocksize] + self.offset


@dataclass(frozen=True)
class NF4Matrix:
    """weight, absmax: names in the file; table: the sixteen values, float32."""

    stored: Stored
    weight: str
    absmax: str
    table: np.ndarray
    blocksize: int
    nested: Nested | None = None

    def read(self, reader: Reader, rows: slice, columns: slice) -> np.ndarray:
        """[out, in] float32: the products that bitsandbytes computes, before they are rounded to a smaller dtype."""
        out, in_ = self.stored.shape
        rows, columns = bounds(rows, out), bounds(columns, in_)
        part = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        if part.size:
            fill = self._fill_blocks if in_ % self.blocksize == 0 else self._fill_flat
            fill(part, reader, rows, columns)
        return part

    def _fill_blocks(self, part: np.ndarray, reader: Reader, rows: slice, columns: slice) -> None:
        """Where every row is whole blocks: only the blocks that the columns touch are unpacked."""
        size, in_ = self.blocksize, self.stored.shape[1]
        per_row = in_ // size
        blocks = slice(columns.start // size, -(-columns.stop // size))
        inside = slice(columns.start - blocks.start * size, columns.stop - blocks.start * size)
        codes, absmax = self._packed(reader, slice(rows.start * per_row, rows.stop * per_row))
        codes = codes.reshape(len(part), per_row, -1)[:, blocks]
        absmax = absmax.reshape(len(part), per_row)[:, blocks]
        height = max(1, AT_ONCE // (codes.shape[1] * size))
        for begin in range(0, len(part), height):
            some = slice(begin, begin + height)
            row = np.arange(len(part))[some, None] + rows.start
            values = self._unpack(codes[some], absmax[some], row * per_row + np.arange(blocks.start, blocks.stop))
            part[some] = values.reshape(len(row), -1)[:, inside]

    def _fill_flat(self, part: np.ndarray, reader: Reader, rows: slice, columns: slice) -> None:
        """Where blocks run over the ends of rows: strips of whole rows are unpacked, and cut."""
        size, in_ = self.blocksize, self.stored.shape[1]
        height = max(1, AT_ONCE // in_)
        for begin in range(rows.start, rows.stop, height):
            end = min(begin + height, rows.stop)
            blocks = slice(begin * in_ // size, -(-end * in_ // size))
            codes, absmax = self._packed(reader, blocks)
            values = self._unpack(codes, absmax, np.arange(blocks.start, blocks.stop)).reshape(-1)
            strip = values[begin * in_ - blocks.start * size :][: (end - begin) * in_].reshape(-1, in_)
            part[begin - rows.start : end - rows.start] = strip[:, columns]

    def _packed(self, reader: Reader, blocks: slice) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [blocks, blocksize / 2] and their magnitudes [blocks] as stored; a last short block is filled up."""
        half = self.blocksize // 2
        codes = reader.read(self.weight, slice(blocks.start * half, blocks.stop * half)).reshape(-1)
        lacking = (blocks.stop - blocks.start) * half - len(codes)
        if lacking:
            codes = np.pad(codes, (0, lacking))
        return codes.reshape(-1, half), reader.read(self.absmax, blocks)

    def _unpack(self, codes: np.ndarray, absmax: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Bytes [..., blocksize / 2], magnitudes [...] and their places [...] -> values [..., blocksize]."""
        pairs = np.stack([np.repeat(self.table, CODES), np.tile(self.table, CODES)], axis=1)  # [256, 2], by byte
        values = np.empty((*codes.shape, 2), np.float32)
        # moved as items of eight bytes; a byte is always within the table, so nothing is clipped
        np.take(pairs.view(np.complex64)[:, 0], codes, out=values.view(np.complex64)[..., 0], mode="clip")
        values = values.reshape(*codes.shape[:-1], self.blocksize)
        values *= (self.nested.unpack(absmax, index) if self.nested else absmax)[..., None]
        return values


def find(reader: Reader, said: Said) -> Survey:
    """All matrices of the checkpoint, or what stands in the way of reading them."""
    found = Survey(notes=said.unread({*KNOWN, *IGNORED}), findings=said.refused(KNOWN))
    if not (said.get("load_in_4bit", said.get("_load_in_4bit"))):
        found.findings.append(f"{said.file} does not say load_in_4bit = True; nothing else of bitsandbytes is known")
    if found.findings:
        return found
    modules = survey.group_names(reader.stored, (*KINDS, STATE, *OTHER_STATES))
    halves = set()
    for weight, members in modules.items():
        found.used.update([*members.values(), weight])
        matrix, findings = _matrix(reader, weight, members)
        found.findings += findings
        if matrix is not None:
            found.matrices[weight] = matrix
            halves.add(shown(str(_state(reader, members[STATE]).get("dtype"))))
    if found.matrices:
        double = any(matrix.nested for matrix in found.matrices.values())
        note = f"{len(found.matrices)} tensors are packed as bitsandbytes NF4{', double-quantized,' * double} and are "
        half = halves.pop() if len(halves) == 1 else None
        rounding = f"; --dtype {half} rounds each value as bitsandbytes does" if half in survey.HALF else ""
        found.notes.insert(0, f"{note}unpacked to float32{rounding}")
    return found


def _state(reader: Reader, name: str) -> dict:
    """The JSON object that bitsandbytes keeps in a tensor of bytes; empty when it is none."""
    stored = reader.stored[name]
    if stored.dtype != "U8" or len(stored.shape) != 1 or stored.shape[0] > MAX_STATE:
        return {}
    content = reader.read(name).tobytes()
    if content.count(b"[") + content.count(b"{") > MAX_BRACKETS:  # or printing a value could run out of stack
        return {}
    try:
        state = parse_json(content.decode("utf-8"))
    except JSON_ERRORS:
        return {}
    return state if isinstance(state, dict) else {}


def _matrix(reader: Reader, weight: str, members: Mapping[str, str]) -> tuple[NF4Matrix | None, list[str]]:
    """The matrix of a weight when its members fit each other, else the findings."""
    other = [kind for kind in OTHER_STATES if kind in members]
    if other:
        return None, [f"{members[other[0]]}: packed as {other[0].rpartition('__')[2]}; known: nf4"]
    nested = any(kind in members for kind in NESTED)
    findings = survey.missing(weight, members, (STATE, *(KINDS if nested else KINDS[:2])))
    if weight not in reader.stored:
        findings.append(f"{weight} is not there, but {', '.join(members)} of it")
    if findings:
        return None, findings
    state = _state(reader, members[STATE])
    findings = [f"{members[STATE]} has {what}" for what in _bad_values(state, nested=nested)]
    findings = findings or _misfits(reader, weight, members, state)
    if findings:
        return None, findings
    size = state["blocksize"]
    kept = Stored("F32", tuple(state["shape"]), reader.stored[weight].file, packed=f"NF4, blocks of {size}")
    held = {kind: np.array(reader.read(members[kind])) for kind in members.keys() & HELD}
    infinite = [members[kind] for kind in TABLES if not np.isfinite(held.get(kind, 0)).all()]
    if infinite:
        return None, [f"{name} is not finite" for name in infinite]
    inner = _nested(held, state) if nested else None
    return NF4Matrix(kept, weight, members["absmax"], held["quant_map"], size, inner), []


def _bad_values(state: Mapping, *, nested: bool) -> list[str]:
    """What in the description of a tensor cannot be worked with."""
    shape = state.get("shape")
    good = {
        "quant_type": state.get("quant_type") == "nf4",
        "blocksize": _is_blocksize(state.get("blocksize")),
        "shape": isinstance(shape, list) and len(shape) == 2 and all(map(_is_size, shape)),
    }
    if nested:
        offset = state.get("nested_offset")
        good["nested_blocksize"] = _is_blocksize(state.get("nested_blocksize"))
        good["nested_offset"] = type(offset) in (int, float) and abs(offset) <= MAX_FLOAT
    return [f"{key} = {shown_value(state.get(key))}" for key, fine in good.items() if not fine]


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= safetensors.MAX_NUMBER


def _is_blocksize(value: object) -> bool:
    return type(value) is int and value in BLOCKSIZES


def _misfits(reader: Reader, weight: str, members: Mapping[str, str], state: Mapping) -> list[str]:
    """Members of another dtype or shape than the description asks for."""
    count = math.prod(state["shape"])
    blocks = -(-count // state["blocksize"])
    nested = NESTED[0] in members
    due = {
        "absmax": (("U8",) if nested else ("F32",), (blocks,)),
        "quant_map": (("F32",), (CODES,)),
    }
    if nested:
        due["nested_absmax"] = (("F32",), (-(-blocks // state["nested_blocksize"]),))
        due["nested_quant_map"] = (("F32",), (NESTED_CODES,))
    findings = survey.differing(weight, reader.stored[weight], ("U8",), (-(-count // 2), 1))
    for kind, expected in due.items():
        findings += survey.differing(members[kind], reader.stored[members[kind]], *expected)
    return findings


def _nested(held: Mapping[str, np.ndarray], state: Mapping) -> Nested:
    offset = np.float32(state["nested_offset"])
    return Nested(held["nested_quant_map"], held["nested_absmax"], state["nested_blocksize"], offset)
