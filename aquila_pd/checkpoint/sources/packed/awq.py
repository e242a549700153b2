"""AWQ reader, 4 bits in the GEMM order of AutoAWQ: qweight, qzeros, scales.

Words run along the outputs; value i of a word, from the low end, is output [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight.
So the low halves of all bytes of a word hold two outputs that follow each other, 16 bits apart. Zero points lie in the
same order, as they are. GEMV and Marlin order their words in other ways.
"""

from collections.abc import Mapping

import numpy as np

from ..reader import Reader, Stored
from . import survey
from .grouped import WORD, Grouped
from .settings import Settings
from .survey import Survey

KINDS = ("qweight", "qzeros", "scales")
BITS = 4
IN_A_WORD = WORD // BITS
KNOWN = {"bits": (BITS,), "version": ("gemm",), "zero_point": (True,), "pack_dtype": ("int32",)}
# which modules were left out is seen from the tensors; the rest chooses a kernel
IGNORED = {
    *("quant_method", "group_size", "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len"),
    *("modules_to_fuse", "exllama_config", "damp_percent"),
}
PAIR = np.uint32(0x000F000F)


def unpack(words: np.ndarray) -> np.ndarray:
    """int32 words [R, C] -> int16 values [R, 8C] in the order of outputs."""
    words = words.view(np.uint32)
    pairs = np.empty((*words.shape, IN_A_WORD // 2), np.uint32)  # two 16-bit numbers each, the first lowest
    for pair in range(IN_A_WORD // 2):
        np.bitwise_and(words >> np.uint32(BITS * pair), PAIR, out=pairs[:, :, pair])
    return pairs.reshape(len(words), -1).view("<i2")


class AWQMatrix(Grouped):
    """An AWQ matrix: consecutive groups, zero points stored without an offset."""

    def _words(self, ins: slice, outs: slice) -> tuple[slice, slice]:
        return ins, slice(outs.start // IN_A_WORD, outs.stop // IN_A_WORD)

    def _unpack(self, words: np.ndarray) -> np.ndarray:
        return unpack(words)

    def _unpack_zeros(self, words: np.ndarray) -> np.ndarray:
        return unpack(words)

    def _true_zeros(self, zeros: np.ndarray) -> np.ndarray:
        return zeros


def find(reader: Reader, settings: Settings) -> Survey:
    """All matrices of the checkpoint, or what stands in the way of reading them."""
    found = Survey(notes=settings.unread({*KNOWN, *IGNORED}), findings=settings.refused(KNOWN))
    found.findings += [
        f"{settings.file} does not say {key}" for key in ("bits", "version") if settings.get(key) is None
    ]
    found.findings += settings.refused_group_size()
    if found.findings:
        return found
    size = settings.group_size()
    name = f"AWQ {BITS}-bit, " + ("one group" if size == -1 else f"groups of {size}")
    modules = survey.group_names(reader.stored, KINDS)
    for module, members in modules.items():
        found.used.update(members.values())
        matrix, findings = _matrix(module, members, reader.stored, group_size=size, name=name)
        found.findings += findings
        if matrix is not None:
            found.matrices[f"{module}.weight"] = matrix
    survey.drop_biases(reader, modules, found)
    if found.matrices:
        scales = {reader.stored[matrix.scales].dtype for matrix in found.matrices.values()}
        found.notes.insert(0, survey.unpacking_note(len(found.matrices), name, scales))
    return found


def _matrix(
    module: str, members: Mapping[str, str], stored: Mapping[str, Stored], *, group_size: int, name: str
) -> tuple[AWQMatrix | None, list[str]]:
    """The matrix of a module when its members fit each other, else the findings."""
    findings = survey.missing(module, members, KINDS) + survey.twice(module, members, stored)
    findings = findings or _misfits(members, stored, group_size)
    if findings:
        return None, findings
    qweight = stored[members["qweight"]]
    in_, words = qweight.shape
    kept = Stored("F32", (words * IN_A_WORD, in_), qweight.file, packed=name)
    return AWQMatrix(kept, BITS, *(members[kind] for kind in KINDS), in_ if group_size == -1 else group_size), []


def _misfits(members: Mapping[str, str], stored: Mapping[str, Stored], group_size: int) -> list[str]:
    """Members of another dtype or shape than qweight asks for."""
    qweight, qzeros, scales = (members[kind] for kind in KINDS)
    dtype, shape = stored[qweight].dtype, stored[qweight].shape
    if dtype != "I32" or len(shape) != 2 or 0 in shape:
        return [f"{qweight} is {dtype} {list(shape)}, where I32 [in, out / 8] was due"]
    in_, words = shape
    size = in_ if group_size == -1 else group_size
    if in_ % size:
        return [f"{qweight} has {in_} rows, which are not whole groups of {size}"]
    groups = in_ // size
    findings = survey.differing(qzeros, stored[qzeros], ("I32",), (groups, words))
    return findings + survey.differing(scales, stored[scales], survey.FLOATS, (groups, words * IN_A_WORD))
