"""Adapter export: merge into the base's weights as a streaming conversion, or copy the adapter alone.

The merged folder is what `aquila-pd convert` would have made of the merged model: weights, configuration, tokenizer,
code, manifest. Memory stays at a few hundred megabytes whatever the model's size, the commit is atomic, and the same
command resumes after a kill.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ..checkpoint.chat_template import Recorded, choose_template
from ..checkpoint.ids import GENERATION_CONFIG, check_vocabulary
from ..checkpoint.io.output import check_output
from ..checkpoint.io.pipeline import count_workers
from ..checkpoint.io.staging import completed, staging
from ..checkpoint.layout import CONFIG, read_json
from ..checkpoint.plan import Plan, make_plan
from ..checkpoint.sources import Source, open_source
from ..checkpoint.targets import PADDLE, find_target
from ..checkpoint.transaction import Transaction, disk_failures
from ..formats.safetensors import DEFAULT_SHARD_SIZE, write_json
from ..utils.errors import CheckpointError, ConfigError, printable
from ..utils.units import counted, megabytes
from .merged_source import MergedSource
from .peft_files import CONFIG as ADAPTER_CONFIG
from .peft_files import Adapter, check_fits, open_adapter

ONTO = ("trained", "original")
ADVICE = " Make room there."  # what helps when the disk fails


def merge_folder(
    base: Path | str,
    adapter: Path | str | None,
    output: Path | str,
    *,
    onto: str = "trained",
    template: str | None = None,
    workers: int | None = None,
    fsync: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Merge an adapter into the weights of its base and write a model folder; adapter None writes the base itself.

    base: a folder of Paddle weights, or of torch's. The adapter is added in float32 and each value rounded once to the
    dtype it has in the base. onto: the weights the adapter was "trained" on, which for QLoRA are those left of NF4, or
    the "original" ones. template: the chat template to record in place of the base's. overwrite: replace
    an earlier export, or conversion, once the new one is complete.
    Raises an AquilaError before anything is written for what does not fit, and leaves nothing after any error.
    """
    base, output = Path(base), Path(output)
    if onto not in ONTO:
        raise ConfigError(f"An adapter is merged onto the weights it was {' or '.join(ONTO)}, not {onto!r}.")
    workers = count_workers(workers)
    opened_adapter = None if adapter is None else open_adapter(adapter)
    _check_base(base)
    with open_source(base) as opened, TemporaryDirectory(prefix="aquila_pd-") as prepared:
        source = _merged(opened, opened_adapter, onto)
        plan = _plan(opened, source, template)
        _prepare_tokenizer(plan, Path(prepared))
        say(describe(source, plan, output))
        transaction = Transaction(
            source=source,
            plan=plan,
            output=output,
            tokenizer=Path(prepared),
            protected=[base, *([opened_adapter.folder] if opened_adapter else [])],
            changed=f"{base} or the adapter changed while it was read. Export again when it is done.",
            workers=workers,
            advice=ADVICE,
            overwrite=overwrite,
            fsync=fsync,
            say=say,
        )
        transaction.recover()
        transaction.check_output()
        written = transaction.run()
    with completed(output):
        for line in written.findings:
            say(f"  warning   {printable(line)}")
        say(f"Wrote {counted(len(plan.moves), 'tensor')}, {megabytes(plan.nbytes)}, to {output}.")


def _check_base(base: Path) -> None:
    if (base / ADAPTER_CONFIG).is_file() and not (base / CONFIG).is_file():
        raise CheckpointError(f"{base} is an adapter. The base is the folder of the model it was trained on.")
    if not base.exists():
        raise CheckpointError(f"The base model {base} does not exist. Say with --base where it is now.")


def _merged(base: Source, adapter: Adapter | None, onto: str) -> MergedSource:
    if adapter is None:
        return MergedSource(base, None)
    check_fits(adapter, base.dims)
    return MergedSource(base, adapter, packed=adapter.packed if onto == "trained" else ())


def _plan(base: Source, source: MergedSource, template: str | None) -> Plan:
    """The converter's plan, for our own Paddle decoder."""
    recorded = Recorded(None, "as the base has it") if template is None else choose_template(base, base.path, template)
    target = find_target(PADDLE)
    plan = make_plan(source, target, dtype=None, max_shard_size=DEFAULT_SHARD_SIZE, chat_template=recorded)
    file = base.path / GENERATION_CONFIG
    if base.framework == PADDLE and file.is_file():  # its options are Paddle's already
        plan = replace(plan, generation={**read_json(file), **plan.generation})
    return plan


def describe(source: MergedSource, plan: Plan, output: Path) -> str:
    """The plan of a merge as text."""
    adapter, lines = source.adapter, [f"Export {plan.source}"]
    if adapter is not None:
        spec = adapter.spec
        kind = "DoRA" if spec.dora else "rsLoRA" if spec.rslora else "LoRA"
        lines += [
            f"  with      {adapter.folder}",
            f"            {kind}, r {spec.r}, scaling {source.scaling:g}, on {', '.join(spec.targets)}",
        ]
        if adapter.packed:
            which = "what NF4 left of them, as trained" if source.packed else "as they are, which was not what it saw"
            lines.append(f"  weights   {', '.join(adapter.packed)}: {which}")
    lines += [
        f"     to     {output}",
        f"  output    {counted(len(plan.moves), 'tensor')}, {plan.dtype}, {megabytes(plan.nbytes)}",
        f"  chat      {plan.chat_template}",
    ]
    return "\n".join(map(printable, [*lines, *(f"  warning   {warning}" for warning in plan.warnings)]))


def _prepare_tokenizer(plan: Plan, folder: Path) -> None:
    """Make the tokenizer's files before any weight is written: one that cannot be read or used stops the plan."""
    from ..tokenization.convert import TOKENIZER_JSON, write_tokenizer  # imports tokenizers

    written = write_tokenizer(plan.source, folder, chat_template=plan.chat_template.jinja)
    if TOKENIZER_JSON in written:
        check_vocabulary(folder, plan.fields["vocab_size"])


# ---------------------------------------------------------------------------------------------- adapters alone


def copy_adapter(adapter: Path | str, output: Path | str, *, base: str | None = None) -> None:
    """Copy an adapter's files, for transformers and peft. base: the base model to record, a folder or a hub id.

    Raises CheckpointError for files that are no adapter, OutputError when something is at the output.
    """
    opened, output = open_adapter(adapter), Path(output)
    nbytes = sum(path.stat().st_size for path in opened.files)
    check_output(output, opened.folder, overwrite=False, nbytes=nbytes)
    failures = disk_failures(output, reading=opened.files, advice=ADVICE)
    with staging(output, say=lambda line: None) as stage, failures:
        for path in opened.files:
            shutil.copyfile(path, stage.folder / path.name)
        if base is not None:
            config = read_json(opened.folder / ADAPTER_CONFIG)
            write_json(stage.folder / ADAPTER_CONFIG, {**config, "base_model_name_or_path": base})
