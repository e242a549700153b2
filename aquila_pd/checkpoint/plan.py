"""Everything a conversion will do, and everything that stands in its way, before a byte is written."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import shards
from ..errors import CheckpointError, ConfigError, report
from ..families.base import paddle_config
from ..shards import Entry, Shard
from ..weight_map import BASE_MODEL_PREFIX, EMBEDDING, HEAD, Weight, weights, why_dropped
from .ids import GENERATION_CONFIG, generation_ids, reconcile, tokenizer_ids
from .layout import read_json
from .progress import counted
from .sources import Source

TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NAMES = {tag: name for name, tag in TAGS.items()}
AS_STORED = {**{tag: tag for tag in NAMES}, "F64": "F32"}  # Paddle models have no double precision
TIED_REASON = "the config ties the head to the embedding, and the two are equal"


@dataclass(frozen=True)
class Plan:
    """moves: Paddle name -> its weight; dropped: (Hugging Face name, reason).

    config, generation: contents of the Paddle model's config.json and generation_config.json.
    """

    source: Path
    kind: str
    family: str
    config: dict
    generation: dict
    shards: tuple[Shard, ...]
    moves: dict[str, Weight]
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    bytes_in: int

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


# sampling options that mean the same in PaddleNLP; max_length does not (there it counts new tokens only)
GENERATION_KEYS = ("max_new_tokens", "min_new_tokens", "repetition_penalty", "num_beams", "length_penalty")
SAMPLING_KEYS = ("temperature", "top_k", "top_p")


def generation_config(source: Source, fields: dict, ids: dict[str, int]) -> tuple[dict, list[str]]:
    """generation_config.json: token ids, and the source's options as far as PaddleNLP has them; and warnings.

    fields: vocab_size and the reconciled ids of config.json; ids: the tokenizer's. Raises CheckpointError.
    """
    path = source.path / GENERATION_CONFIG
    theirs = read_json(path) if path.is_file() else {}
    found, warnings = generation_ids(fields, theirs, ids)
    keys = GENERATION_KEYS + (SAMPLING_KEYS if theirs.get("do_sample") else ())
    kept = {key: theirs[key] for key in keys if theirs.get(key) is not None}
    return {**found, **({"decode_strategy": "sampling"} if theirs.get("do_sample") else {}), **kept}, warnings


def make_plan(source: Source, *, dtype: str | None, max_shard_size: str | int) -> Plan:
    """Plan the conversion of an open source. dtype None keeps what is stored.

    Raises CheckpointError listing every missing, unexpected and misshapen tensor together, ConfigError for options.
    """
    if dtype is not None and dtype not in TAGS:
        raise ConfigError(f"The dtype {dtype!r} is not known. Choose one of {', '.join(TAGS)}.")
    limit = shards.parse_size(max_shard_size)
    wanted = weights(source.dims)
    dropped = _dropped(source)
    findings = compare(source, wanted, {name for name, _ in dropped})
    if findings:
        raise CheckpointError(_report(source, findings))
    dropped += _check_tied_head(source)
    entries = [
        Entry(w.paddle, TAGS.get(dtype or "", AS_STORED[source.tensors[w.hf].dtype]), w.paddle_shape) for w in wanted
    ]
    ids = tokenizer_ids(source.path)
    fields, warnings = reconcile(source.fields, ids)
    generation, more = generation_config(source, fields, ids)
    warnings += [warning for warning in more if warning not in warnings]
    written = _main_dtype(entries)
    if dtype is None and fields["dtype"] not in (None, written):
        warnings.append(f"config.json says {fields['dtype']}, the weights are {written}; {written} is written")
    return Plan(
        source=source.path,
        kind=source.layout.kind,
        family=source.family.name,
        config=paddle_config(fields, written),
        generation=generation,
        shards=tuple(shards.plan_shards(entries, limit)),
        moves={weight.paddle: weight for weight in wanted},
        dropped=tuple(dropped),
        notes=tuple(source.notes),
        warnings=tuple(warnings),
        bytes_in=source.nbytes,
    )


def compare(source: Source, wanted: list[Weight], dropped: set[str]) -> list[str]:
    """What the files hold against what config.json describes, one line for each difference."""
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


def _report(source: Source, findings: list[str]) -> str:
    if any(name.startswith(f"{BASE_MODEL_PREFIX}.") for name in source.tensors):
        advice = (
            f"Names beginning with {BASE_MODEL_PREFIX}. are a Paddle checkpoint's: this folder needs no conversion."
        )
    else:
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
    if not _equal_rows(source.read(HEAD.hf), source.read(EMBEDDING.hf)):
        raise CheckpointError(
            f"{source.path}: config.json says tie_word_embeddings, but {HEAD.hf} differs from {EMBEDDING.hf}.\n"
            f'Nothing was written. If the head is meant, set "tie_word_embeddings": false in a copy of config.json; '
            f"if not, remove {HEAD.hf} from the source."
        )
    return []


def _equal_rows(a: np.ndarray, b: np.ndarray, rows: int = 1024) -> bool:
    """Equality without a temporary of the tensors' size."""
    return a.shape == b.shape and all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def _main_dtype(entries: list[Entry]) -> str:
    """The dtype most bytes have: norms are sometimes stored wider than the rest."""
    counts: Counter = Counter()
    for entry in entries:
        counts[entry.dtype] += entry.nbytes
    return NAMES[counts.most_common(1)[0][0]]


def describe(plan: Plan, output: Path) -> str:
    """The plan as text for a person, without its warnings."""
    c = plan.config
    tensors = len(plan.moves)
    files = f"{len(plan.shards)} shards" if len(plan.shards) > 1 else "one file"
    heads = f"{c['num_attention_heads']}/{c['num_key_value_heads']} heads"
    lines = [
        f"Convert {plan.source}",
        f"     to {output}",
        f"  family    {plan.family}: {c['num_hidden_layers']} layers, hidden {c['hidden_size']}, {heads}, "
        f"intermediate {c['intermediate_size']}, vocabulary {c['vocab_size']}"
        + (", tied head" if c["tie_word_embeddings"] else ""),
        f"  rotary    theta {c['rope_theta']:g}, {c['max_position_embeddings']} positions, "
        + ("scaling {type} x{factor:g}".format(**c["rope_scaling"]) if c["rope_scaling"] else "no scaling"),
        f"  source    {plan.kind}, {megabytes(plan.bytes_in)}",
        f"  output    {counted(tensors, 'tensor')}, {c['dtype']}, {megabytes(plan.nbytes)} in {files}",
    ]
    for reason, names in _by_reason(plan.dropped).items():
        lines.append(f"  dropped   {counted(len(names), 'tensor')}, {names[0]} first: {reason}")
    lines += [f"  note      {note}" for note in plan.notes]
    return "\n".join(lines)


def _by_reason(dropped: tuple[tuple[str, str], ...]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in dropped:
        reasons.setdefault(reason, []).append(name)
    return reasons


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
