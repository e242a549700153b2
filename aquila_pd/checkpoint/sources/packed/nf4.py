"""bitsandbytes NF4 in a checkpoint: finds the tensors of each packed matrix, checks them, hands them to the codec.

The values of both tables are read from the file; formats/nf4.py has the layout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from ....formats import safetensors
from ....formats.nf4 import CODES, Decoder, Nested
from ....utils.errors import shown, shown_value
from ....utils.files import JSON_ERRORS, parse_json
from ..reader import Reader, Stored
from . import survey
from .settings import Settings
from .survey import Survey

KINDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE = "quant_state.bitsandbytes__nf4"
OTHER_STATES = ("quant_state.bitsandbytes__fp4",)
NESTED = KINDS[2:]
TABLES = ("quant_map", "nested_quant_map")
HELD = {*TABLES, *NESTED}  # in memory: small, and used for every part
NESTED_CODES = 256
BLOCKSIZES = tuple(2**n for n in range(5, 13))  # 32 to 4096, those that quantize_4bit of bitsandbytes 0.50 takes
MAX_STATE = 4096  # bytes of the description of a tensor; real ones have 200
MAX_BRACKETS = 16  # in it; real ones have two pairs
MAX_FLOAT = float(np.finfo(np.float32).max)
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
class NF4Matrix:
    """A packed matrix of a checkpoint. weight, absmax: names in the file."""

    stored: Stored
    weight: str
    absmax: str
    decoder: Decoder

    def read(self, reader: Reader, rows: slice, columns: slice) -> np.ndarray:
        """[out, in] float32: the products that bitsandbytes computes, before they are rounded to a smaller dtype."""
        return self.decoder.decode(partial(reader.read, self.weight), partial(reader.read, self.absmax), rows, columns)


def find(reader: Reader, settings: Settings) -> Survey:
    """All matrices of the checkpoint, or what stands in the way of reading them."""
    found = Survey(notes=settings.unread({*KNOWN, *IGNORED}), findings=settings.refused(KNOWN))
    if not (settings.get("load_in_4bit", settings.get("_load_in_4bit"))):
        found.findings.append(
            f"{settings.file} does not say load_in_4bit = True; nothing else of bitsandbytes is known"
        )
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
        double = any(matrix.decoder.nested for matrix in found.matrices.values())
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
    decoder = Decoder(kept.shape, held["quant_map"], size, _nested(held, state) if nested else None)
    return NF4Matrix(kept, weight, members["absmax"], decoder), []


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
