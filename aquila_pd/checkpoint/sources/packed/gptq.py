"""GPTQ reader, 2, 3, 4 and 8 bits of AutoGPTQ and GPTQModel: qweight, qzeros, scales, g_idx.

Values lie in a stream of bits, the first lowest, that runs through the words of a column of qweight and of a row of
qzeros: 8 values of 4 bits to a word, 32 values of 3 bits to three words, the 11th and the 22nd over two. That is how
QuantLinear.pack of AutoGPTQ 0.7.1 writes them.

Zero points are stored less one (v1, the format "gptq") or as they are (v2, "gptq_v2"). In v1 the stored value of all
ones is read as zero: the kernels AutoGPTQ chooses by itself (exllama, and cuda_old since 0.6) keep the low bits of
stored + 1. Its qlinear_cuda reads 2**bits there, and GPTQModel carries the one into the next zero point; no quantizer
makes a zero point of 2**bits, so theirs cannot be meant.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ....formats import safetensors
from ....utils.errors import shown_value
from ..reader import Reader, Stored
from . import survey
from .grouped import WORD, Grouped
from .settings import Settings
from .survey import Survey

KINDS = ("qweight", "qzeros", "scales", "g_idx")
NEEDED = KINDS[:3]
KNOWN = {
    "bits": (2, 3, 4, 8),
    "checkpoint_format": ("gptq", "gptq_v2"),
    "format": ("gptq", "gptq_v2"),
    "method": ("gptq",),
    "pack_dtype": ("int32",),
    "is_marlin_format": (False,),
    "desc_act": (True, False),
    "sym": (True, False),
    "lm_head": (True, False),
}
# how the integers were found, or which kernel multiplies them: nothing that reading them needs to know
IGNORED = {
    *("quant_method", "group_size", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "meta"),
    *("model_name_or_path", "model_file_base_name", "dataset", "tokenizer", "batch_size", "pad_token_id"),
    *("use_cuda_fp16", "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "backend"),
    *("use_exllama", "disable_exllama", "exllama_config", "max_input_length", "cache_block_outputs", "mse"),
    *("modules_in_block_to_quantize", "modules_to_not_convert", "dynamic"),
}


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 words [R, C] with a stream of values down each column -> int32 values [R * 32 / bits, C]."""
    unit = math.lcm(bits, WORD) // WORD  # words after which a value begins at the lowest bit again
    count = unit * WORD // bits  # values in them
    word, shift = np.divmod(np.arange(count) * bits, WORD)
    words = words.view(np.uint32).reshape(-1, unit, words.shape[1])
    values = (words if unit == 1 else words[:, word]) >> shift.astype(np.uint32)[:, None]  # [units, count, C]
    for value in np.flatnonzero(shift + bits > WORD):
        values[:, value] |= words[:, word[value] + 1] << np.uint32(WORD - shift[value])
    values &= np.uint32(2**bits - 1)
    return values.reshape(-1, words.shape[2]).view(np.int32)


@dataclass(frozen=True)
class GPTQMatrix(Grouped):
    """A GPTQ matrix. less_one: zero points are stored less one (v1)."""

    less_one: bool = True

    def _words(self, ins: slice, outs: slice) -> tuple[slice, slice]:
        return slice(ins.start * self.bits // WORD, ins.stop * self.bits // WORD), outs

    def _unpack(self, words: np.ndarray) -> np.ndarray:
        return unpack(words, self.bits)

    def _unpack_zeros(self, words: np.ndarray) -> np.ndarray:
        return unpack(words.T, self.bits).T

    def _true_zeros(self, zeros: np.ndarray) -> np.ndarray:
        return zeros + 1 & 2**self.bits - 1 if self.less_one else zeros


@dataclass(frozen=True)
class Scheme:
    """Settings common to all matrices. group_size: None for one group; symmetric: None when not stated."""

    bits: int
    group_size: int | None
    act_order: bool
    symmetric: bool | None
    less_one: bool

    @property
    def name(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "one group"
        return f"GPTQ {self.bits}-bit, {groups}"


def find(reader: Reader, settings: Settings) -> Survey:
    """All matrices of the checkpoint, or what stands in the way of reading them."""
    scheme, findings = _read_scheme(settings)
    found = Survey(notes=settings.unread({*KNOWN, *IGNORED}), findings=findings)
    if scheme is None:
        return found
    modules = survey.group_names(reader.stored, KINDS)
    for module, members in modules.items():
        found.used.update(members.values())
        matrix, findings = _matrix(module, members, reader.stored, scheme)
        found.findings += findings
        if matrix is not None:
            found.matrices[f"{module}.weight"] = matrix
    orders = {f"{module}.weight": members["g_idx"] for module, members in modules.items() if "g_idx" in members}
    _order_inputs(reader, orders, found, scheme)
    survey.drop_biases(reader, modules, found)
    _settle_zeros(reader, found, scheme)
    return found


def _read_scheme(settings: Settings) -> tuple[Scheme | None, list[str]]:
    findings = settings.refused(KNOWN)
    findings += settings.refused_group_size(default=-1)
    if settings.get("bits") is None:
        findings.append(f"{settings.file} does not say bits; known: {', '.join(map(str, KNOWN['bits']))}")
    findings += _exceptions(settings)
    if findings:
        return None, findings
    size = settings.group_size(default=-1)
    label = settings.get("checkpoint_format", settings.get("format", "gptq"))
    scheme = Scheme(
        bits=settings.get("bits"),
        group_size=None if size == -1 else size,
        act_order=settings.get("desc_act", False),
        symmetric=settings.get("sym"),
        less_one=label.lower() == "gptq",
    )
    return scheme, []


def _exceptions(settings: Settings) -> list[str]:
    """A finding for each rule by which some modules are packed in another way than the rest.

    A rule that begins with "-:" leaves modules unpacked, which is seen from the tensors that are there.
    """
    rules = settings.get("dynamic", {})
    own = [rule for rule in rules if not rule.startswith("-:")] if isinstance(rules, dict) else [rules]
    return [
        f"{settings.file} says dynamic = {shown_value(rule)}: modules packed in a way of their own are not known"
        for rule in own
    ]


def _matrix(
    module: str, members: Mapping[str, str], stored: Mapping[str, Stored], scheme: Scheme
) -> tuple[GPTQMatrix | None, list[str]]:
    """The matrix of a module when its members fit each other, else the findings."""
    findings = survey.missing(module, members, NEEDED) + survey.twice(module, members, stored)
    findings = findings or _misfits(module, members, stored, scheme)
    if findings:
        return None, findings
    qweight = stored[members["qweight"]]
    in_, out = _sizes(qweight, scheme.bits)
    kept = Stored("F32", (out, in_), qweight.file, packed=scheme.name)
    names = (members[kind] for kind in NEEDED)
    return GPTQMatrix(kept, scheme.bits, *names, scheme.group_size or in_, less_one=scheme.less_one), []


def _sizes(qweight: Stored, bits: int) -> tuple[int, int]:
    return qweight.shape[0] * WORD // bits, qweight.shape[1]


def _misfits(module: str, members: Mapping[str, str], stored: Mapping[str, Stored], scheme: Scheme) -> list[str]:
    """Members of another dtype or shape than qweight asks for."""
    name, bits = members["qweight"], scheme.bits
    qweight = stored[name]
    whole = math.lcm(bits, WORD)  # bits, after which a value begins with a word
    if qweight.dtype != "I32" or len(qweight.shape) != 2 or 0 in qweight.shape or qweight.shape[0] * WORD % whole:
        return [f"{name} is {qweight.dtype} {list(qweight.shape)}, where I32 [in * {bits} / 32, out] was due"]
    in_, out = _sizes(qweight, bits)
    groups = -(-in_ // (scheme.group_size or in_))
    due = {
        "qzeros": (("I32",), (groups, out * bits // WORD)),
        "scales": (survey.FLOATS, (groups, out)),
        "g_idx": (("I32", "I64"), (in_,)),
    }
    findings = []
    for kind in sorted(members.keys() & due.keys()):
        findings += survey.differing(members[kind], stored[members[kind]], *due[kind])
    if out * bits % whole:
        findings.append(f"{name} has {out} columns, whose zero points do not fill whole words")
    if "g_idx" not in members and scheme.act_order and groups > 1:
        findings.append(f"{module} has no g_idx, which desc_act needs")
    return findings


def _order_inputs(reader: Reader, orders: Mapping[str, str], found: Survey, scheme: Scheme) -> None:
    """Give each matrix the groups its g_idx names. A g_idx of zeros only stands for none, as in exllama."""
    empty = unannounced = 0
    for weight, name in orders.items():
        matrix = found.matrices.get(weight)
        if matrix is None:
            continue
        group_of = reader.read(name)
        in_order = matrix.groups(reader, slice(0, len(group_of)))
        groups = in_order[-1] + 1
        if group_of.min() < 0 or group_of.max() >= groups:
            found.findings.append(f"{name} names the groups {group_of.min()} to {group_of.max()} of {groups}")
        elif groups > 1 and not group_of.any():
            empty += 1
        elif not np.array_equal(group_of, in_order):
            unannounced += not scheme.act_order
            found.matrices[weight] = replace(matrix, g_idx=name)
        safetensors.release(group_of)
    if empty:
        found.notes.append(f"{empty} g_idx hold nothing but zeros and are read as none: groups follow each other")
    if unannounced:
        found.notes.append(f"desc_act is not said, but {unannounced} g_idx are not in order; they are followed")


def _settle_zeros(reader: Reader, found: Survey, scheme: Scheme) -> None:
    """Read zero points as v2 where the label says v1 and symmetric zero points say v2, and the other way round.

    A symmetric quantizer has the one zero point 2**(bits - 1), which v1 stores less one.
    """
    if not found.matrices:
        return
    half, ones = 2 ** (scheme.bits - 1), 2**scheme.bits - 1
    expected, other = (half - 1, half) if scheme.less_one else (half, half - 1)
    limits = [_limits(reader, matrix) for matrix in found.matrices.values()]
    lowest, highest = min(low for low, _ in limits), max(high for _, high in limits)
    wrapped = sum(high == ones for _, high in limits)
    less_one = scheme.less_one
    if scheme.symmetric is not False and lowest == highest == other:
        less_one = not less_one
        found.matrices = {name: replace(matrix, less_one=less_one) for name, matrix in found.matrices.items()}
        right, wrong = _version(less_one), _version(not less_one)
        found.notes.append(f"all stored zero points are {other}: they are read as {right}, not {wrong} as labelled")
    elif scheme.symmetric and not lowest == highest == expected:
        found.notes.append(f"sym is said, but stored zero points are {lowest} to {highest}, not all {expected}")
    if less_one and wrapped:
        found.notes.append(f"{wrapped} tensors store the zero point {ones}, read as 0 as AutoGPTQ's own kernels do")
    scales = {reader.stored[matrix.scales].dtype for matrix in found.matrices.values()}
    how = f"{scheme.name} ({_version(less_one)} zeros{', desc_act' * scheme.act_order})"
    found.notes.insert(0, survey.unpacking_note(len(found.matrices), how, scales))


def _limits(reader: Reader, matrix: GPTQMatrix) -> tuple[int, int]:
    """The lowest and the highest zero point as stored."""
    limits = [(int(zeros.min()), int(zeros.max())) for zeros in matrix.stored_zeros(reader)]
    return min(low for low, _ in limits), max(high for _, high in limits)


def _version(less_one: bool) -> str:
    return "v1" if less_one else "v2"
