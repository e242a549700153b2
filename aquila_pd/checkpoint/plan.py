"""Conversion plan: output tensors, shards, config and every obstacle, from headers alone, before a byte is written."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..architecture.weight_map import EMBEDDING, HEAD, Weight, weights, why_dropped
from ..formats import safetensors as shards
from ..formats.dtypes import FLOATS, NAMED
from ..formats.safetensors import Entry, Shard
from ..utils.errors import CheckpointError, ConfigError, report, shown_value
from ..utils.files import is_number
from ..utils.units import parse_size
from .chat_template import Recorded
from .ids import GENERATION_CONFIG, generation_ids, reconcile, tokenizer_ids
from .layout import read_json
from .sources import Source
from .targets import PADDLE, TORCH, Target

TAGS = {name: tag for name, tag in NAMED.items() if tag != "F64"}  # Paddle models have no double precision
AS_STORED = {**{tag: tag for tag in TAGS.values()}, "F64": "F32"}
TIED_REASON = "the config ties the head to the embedding, and the two are equal"


@dataclass(frozen=True)
class Plan:
    """fields: the family's reading of config.json, ids reconciled; dtype: most of the output has it; moves: name in the
    output -> its weight; dropped: (Hugging Face name, reason).

    config, generation: contents of the new config.json and generation_config.json. chat_template: what is recorded
    for chat, None where that is not asked.
    """

    source: Path
    kind: str
    family: str
    target: Target
    fields: dict
    dtype: str
    config: dict
    generation: dict
    shards: tuple[Shard, ...]
    moves: dict[str, Weight]
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    bytes_in: int
    chat_template: Recorded | None = None

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


# sampling options that mean the same in PaddleNLP; max_length does not (there it counts new tokens only)
GENERATION_KEYS = ("max_new_tokens", "min_new_tokens", "repetition_penalty", "num_beams", "length_penalty")
SAMPLING_KEYS = ("temperature", "top_k", "top_p")
DOES_SAMPLE = {"torch": ("do_sample", True), "paddle": ("decode_strategy", "sampling")}


def generation_config(source: Source, fields: dict, ids: dict[str, int], framework: str) -> tuple[dict, list[str]]:
    """generation_config.json: token ids, and the source's options as far as both frameworks have them; and warnings.

    fields: vocab_size and the reconciled ids of config.json; ids: the tokenizer's; framework: of the output.
    Raises CheckpointError.
    """
    path = source.path / GENERATION_CONFIG
    theirs = read_json(path) if path.is_file() else {}
    found, warnings = generation_ids(fields, theirs, ids)
    key, value = DOES_SAMPLE[source.framework]
    samples = theirs.get(key) == value
    keys = GENERATION_KEYS + (SAMPLING_KEYS if samples else ())
    kept = {key: theirs[key] for key in keys if theirs.get(key) is not None}
    odd = [f"{key} is {shown_value(value)}, not a number" for key, value in kept.items() if not is_number(value)]
    if odd:
        advice = "Nothing was written. Mend the file in a copy of the source, or fetch it again."
        raise CheckpointError(report(f"{GENERATION_CONFIG} has options that cannot be:", odd, advice))
    return {**found, **(dict([DOES_SAMPLE[framework]]) if samples else {}), **kept}, warnings


def make_plan(
    source: Source,
    target: Target,
    *,
    dtype: str | None,
    max_shard_size: str | int,
    chat_template: Recorded | None = None,
) -> Plan:
    """Plan the conversion of an open source into a target. dtype None keeps what is stored.

    Raises CheckpointError listing every missing, unexpected and misshapen tensor together, ConfigError for options.
    """
    if dtype is not None and dtype not in TAGS:
        raise ConfigError(f"The dtype {dtype!r} is not known. Choose one of {', '.join(TAGS)}.")
    limit = parse_size(max_shard_size)
    _check_direction(source, target)
    wanted = weights(source.dims)
    dropped = _dropped(source)
    findings = compare(source, wanted, {name for name, _ in dropped})
    if findings:
        raise CheckpointError(_report(source, findings))
    dropped += _check_tied_head(source)
    entries = [
        Entry(target.name(w), TAGS.get(dtype or "", AS_STORED[source.tensors[w.hf].dtype]), target.shape(w))
        for w in wanted
    ]
    ids = tokenizer_ids(source.path)
    fields, warnings = reconcile(source.fields, ids)
    generation, more = generation_config(source, fields, ids, target.framework)
    warnings += [warning for warning in more if warning not in warnings]
    written = _main_dtype(entries)
    if dtype is None and fields["dtype"] not in (None, written):
        warnings.append(f"config.json says {fields['dtype']}, the weights are {written}; {written} is written")
    return Plan(
        source=source.path,
        kind=source.layout.kind,
        family=source.family.name,
        target=target,
        fields=fields,
        dtype=written,
        config=target.config(fields, written),
        generation=generation,
        shards=tuple(shards.plan_shards(entries, limit)),
        moves={target.name(weight): weight for weight in wanted},
        dropped=tuple(dropped),
        notes=tuple(source.notes),
        warnings=tuple(warnings),
        bytes_in=source.nbytes,
        chat_template=chat_template,
    )


def compare(source: Source, wanted: list[Weight], dropped: set[str]) -> list[str]:
    """Stored tensors against those config.json describes: a finding for each difference."""
    found = source.tensors
    names = {weight.hf for weight in wanted}
    findings = [f"missing     {weight.hf}" for weight in wanted if weight.hf not in found]
    for weight in wanted:
        stored = found.get(weight.hf)
        if stored and stored.shape != weight.hf_shape:
            shapes = f"file has {list(stored.shape)}, config says {list(weight.hf_shape)}"
            findings.append(f"shape       {weight.hf}: {shapes} ({stored.file})")
        if stored and stored.dtype not in AS_STORED:
            findings.append(f"dtype       {weight.hf}: {stored.dtype}, not a float ({stored.file})")
    extra = [name for name in found if name not in names and name not in dropped]
    return findings + [f"unexpected  {name} {list(found[name].shape)} ({found[name].file})" for name in extra]


def _check_direction(source: Source, target: Target) -> None:
    """Raise CheckpointError for a source that is what the target makes."""
    if source.framework == PADDLE and target.framework != TORCH:
        raise CheckpointError(
            f"{source.path} is a Paddle checkpoint already: its names begin with a Paddle model's prefix. It needs no "
            "conversion; convert/paddle2torch.py is the way back to torch."
        )
    if source.framework != PADDLE and target.framework == TORCH:
        raise CheckpointError(
            f"{source.path} is not a Paddle checkpoint: no tensor has a Paddle model's prefix.\n"
            "Only Paddle checkpoints go back to torch; convert/torch2paddle.py is the other way."
        )


def _report(source: Source, findings: list[str]) -> str:
    advice = "Compare config.json and the files with where they came from; fetch what differs again."
    headline = f"{source.path} does not hold the model its config.json describes:"
    return report(headline, findings, f"Nothing was written. {advice}")


def _dropped(source: Source) -> list[tuple[str, str]]:
    reasons = [(name, why_dropped(name)) for name in source.tensors]
    found = [(name, reason) for name, reason in reasons if reason]
    if source.dims.tied and HEAD.hf in source.tensors:
        found.append((HEAD.hf, TIED_REASON))
    return found


def _check_tied_head(source: Source) -> list[tuple[str, str]]:
    """Raise CheckpointError when a config calls the head tied and the file's head says something else."""
    if not source.dims.tied or HEAD.hf not in source.tensors:
        return []
    if not _equal_rows(source):
        raise CheckpointError(
            f"{source.path}: config.json says tie_word_embeddings, but {HEAD.hf} differs from {EMBEDDING.hf}.\n"
            f'Nothing was written. If the head is meant, set "tie_word_embeddings": false in a copy of config.json; '
            f"if not, remove {HEAD.hf} from the source."
        )
    return []


def _equal_rows(source: Source, rows: int = 1024) -> bool:
    """Whether head and embedding hold the same bits (NaN too), without a temporary of their size."""
    head, embedding = source.tensors[HEAD.hf], source.tensors[EMBEDDING.hf]
    count = head.shape[0]
    pairs = ([source.read(name, slice(i, i + rows)) for name in (HEAD.hf, EMBEDDING.hf)] for i in range(0, count, rows))
    return (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and all(
        np.array_equal(shards.bits(a), shards.bits(b)) for a, b in pairs
    )


def _main_dtype(entries: list[Entry]) -> str:
    """The dtype most bytes have: norms are sometimes stored wider than the rest."""
    counts: Counter = Counter()
    for entry in entries:
        counts[entry.dtype] += entry.nbytes
    return FLOATS[counts.most_common(1)[0][0]]
