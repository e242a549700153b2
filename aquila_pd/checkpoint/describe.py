"""Description of a plan: the lines printed before a conversion begins."""

from collections.abc import Mapping
from pathlib import Path

from ..architecture.rope_scaling import RopeScaling
from ..utils.errors import printable
from ..utils.units import counted, megabytes
from .plan import Plan
from .targets import TORCH


def describe(plan: Plan, output: Path) -> str:
    """The plan as text for a person, without its warnings."""
    source = f"{plan.kind}, {megabytes(plan.bytes_in)}"
    lines = [
        f"Convert {plan.source}",
        f"     to {output}",
        f"  family    {plan.family}",
        *describe_model(plan.fields),
        f"  source    {source}",
    ]
    lines += [f"  {label:<8}  {text}" for label, text in describe_output(plan)]
    lines += [f"  note      {note}" for note in plan.notes]
    return "\n".join(map(printable, lines))  # names of files and tensors are the source's


def describe_model(fields: Mapping) -> list[str]:
    """The architecture in two lines. fields: the family's reading of config.json."""
    c, rope = fields, RopeScaling.of(fields)
    heads = f"{c['num_attention_heads']}/{c['num_key_value_heads']} heads"
    return [
        f"  model     {c['num_hidden_layers']} layers, hidden {c['hidden_size']}, {heads}, "
        f"intermediate {c['intermediate_size']}, vocabulary {c['vocab_size']}"
        + (", tied head" if c["tie_word_embeddings"] else ""),
        f"  rotary    theta {c['rope_theta']:g}, {c['max_position_embeddings']} positions, {rope.description}",
    ]


def describe_output(plan: Plan) -> list[tuple[str, str]]:
    """What will be written, and what will not, each line with its label."""
    target = plan.target
    made = f"{target.architecture} for {'torch' if target.framework == TORCH else 'PaddleNLP'}"
    files = f"{len(plan.shards)} shards" if len(plan.shards) > 1 else "one file"
    output = f"{made}, {counted(len(plan.moves), 'tensor')}, {plan.dtype}, {megabytes(plan.nbytes)} in {files}"
    chat = [("chat", str(plan.chat_template))] if plan.chat_template else []
    return [("output", output), *chat] + [
        ("dropped", f"{counted(len(names), 'tensor')}, {names[0]} first: {reason}")
        for reason, names in _by_reason(plan.dropped).items()
    ]


def describe_shards(plan: Plan) -> str:
    """One line for each file to be written: name, bytes, tensors, and the first and last of them."""
    width = max(len(f"{shard.nbytes:,}") for shard in plan.shards)
    lines = [
        f"  {shard.file}  {shard.nbytes:>{width},} bytes, {counted(len(shard.entries), 'tensor'):>11}: "
        f"{shard.entries[0].name} to {shard.entries[-1].name}"
        for shard in plan.shards
    ]
    return "\n".join(lines)


def _by_reason(dropped: tuple[tuple[str, str], ...]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in dropped:
        reasons.setdefault(reason, []).append(name)
    return reasons
