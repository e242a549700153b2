"""Checkpoint conversion, torch to Paddle and back by one flow: plan, write, verify, commit (atomic rename)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ..architecture import families
from ..formats import safetensors
from ..utils.errors import ConfigError, printable
from .chat_template import Recorded, choose_template
from .describe import describe, describe_shards
from .estimate import estimate
from .hub import find_input
from .ids import check_vocabulary
from .io.manifest import read_manifest
from .io.pipeline import count_workers
from .io.staging import completed
from .plan import Plan, make_plan
from .report import Summary, check_report, closing_words, write_report
from .sources import Source, open_source
from .targets import PADDLE, PADDLENLP_LLAMA, TORCH, Target, find_target
from .transaction import Transaction, Written
from .verify import check_logits_possible, verify_content, verify_logits

VERIFICATIONS = ("none", "content", "logits")


def convert(
    source: Path | str,
    output: Path | str,
    *,
    framework: str = PADDLE,
    architecture: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = safetensors.DEFAULT_SHARD_SIZE,
    family: str = families.AUTO,
    chat_template: str = families.AUTO,
    verify: str = "content",
    workers: int | None = None,
    fsync: bool = False,
    report_file: Path | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Summary:
    """Convert a checkpoint. Nothing is written before the plan stands, and `output` appears only when it is complete.

    source: a folder, a GGUF file, or the id of a model on the Hugging Face hub.
    framework: "paddle" makes a Paddle folder of a torch checkpoint, "torch" the other way round; architecture: of the
    output, see targets.py. dtype: of the output, None keeps what is stored. chat_template: the name of the one that a
    Paddle folder records, in place of the source's own or the known one. verify: "none", "content" (every value is
    read again and compared) or "logits" (content, and both frameworks run). workers: threads, None for one per core;
    the output does not depend on it. fsync: each finished shard, and at last the output, is on the disk before the run
    goes on, so that it survives a power failure. dry_run ends after the plan and the checks of the output.
    A run that was killed goes on after its last finished shard when it is called again.
    Raises an AquilaError: what was asked, what was found, what to do; its notes say what is left on the disk.
    """
    output = Path(output)
    report_file = Path(report_file) if report_file else None
    workers, target = count_workers(workers), find_target(framework, architecture)
    _check_verification(verify, target)
    safetensors.parse_size(max_shard_size)  # before a large source is opened
    with (
        open_source(find_input(source, weights=not dry_run), family, may_be_planned=dry_run) as opened,
        TemporaryDirectory(prefix="aquila_pd-") as prepared,
    ):
        recorded = _choose_template(opened, source, chat_template, target)
        plan = make_plan(opened, target, dtype=dtype, max_shard_size=max_shard_size, chat_template=recorded)
        warnings = [*plan.warnings, *_prepare_tokenizer(opened, plan, Path(prepared))]
        summary = Summary(plan, output, workers, warnings=warnings)
        say("\n".join([describe(plan, output), *_as_lines(warnings)]))
        originals = dict(protected=[opened.path], changed=_changed(opened))
        how = dict(workers=workers, overwrite=overwrite, fsync=fsync, say=say)
        transaction = Transaction(opened, plan, output, Path(prepared), **originals, **how)
        if dry_run:
            say("\n".join([describe_shards(plan), estimate(plan, workers=workers)]))
        else:
            transaction.recover()
        transaction.check_output()
        check_report(report_file, opened.path, output)
        if verify == "logits":
            check_logits_possible(opened)
        if dry_run:
            say("Dry run: nothing was written" + (", the report neither." if report_file else "."))
            return summary
        transaction.run(partial(_verify, opened, summary, verify=verify, rounded_to=dtype, say=say))
    with completed(output):
        if report_file:
            write_report(report_file, summary)
        say(closing_words(summary))
    return summary


def _check_verification(verify: str, target: Target) -> None:
    if verify not in VERIFICATIONS:
        raise ConfigError(f"The verification {verify!r} is not known. Choose one of {', '.join(VERIFICATIONS)}.")
    if verify == "logits" and (target.framework, target.architecture) != (PADDLE, "aquila"):
        raise ConfigError("--verify logits runs our own Paddle decoder. Use --verify content for this output.")


def _choose_template(opened: Source, source: Path | str, option: str, target: Target) -> Recorded | None:
    if target.framework != TORCH:
        return choose_template(opened, source, option)
    if option != families.AUTO:
        raise ConfigError("A chat template is named for Paddle folders; the way back to torch keeps what is recorded.")
    return None


def _as_lines(warnings: list[str]) -> list[str]:
    return [f"  warning   {printable(warning)}" for warning in warnings]


def _prepare_tokenizer(source: Source, plan: Plan, folder: Path) -> list[str]:
    """Make the tokenizer's files before any weight is written: one that cannot be read or used stops the plan."""
    from ..tokenization.convert import (  # imports tokenizers
        SENTENCEPIECE,
        TOKENIZER_JSON,
        doubts,
        name_as_paddlenlp,
        write_tokenizer,
        write_torch_tokenizer,
    )

    target, recorded = plan.target, plan.chat_template
    if recorded is None:
        written = write_torch_tokenizer(source.path, folder)
    else:
        written = write_tokenizer(source.path, folder, chat_template=recorded.jinja)
        if target.architecture == PADDLENLP_LLAMA and SENTENCEPIECE in written:
            name_as_paddlenlp(folder)
    if TOKENIZER_JSON in written:
        check_vocabulary(folder, source.fields["vocab_size"])
    return doubts(source.path) if written else [f"{source.path} holds no tokenizer files; the output has none either"]


def _changed(source: Source) -> str:
    return (
        f"{source.path} changed while it was read: the output would be half of one model and half of another. "
        "Convert again when nobody writes to it any more."
    )


def _verify(
    source: Source,
    summary: Summary,
    written: Written,
    *,
    verify: str,
    rounded_to: str | None,
    say: Callable[[str], None],
) -> None:
    """Report what was written, then compare it with the source as far as `verify` asks for."""
    for line in _as_lines(written.findings):
        say(line)
    summary.warnings += written.findings
    summary.nonfinite, summary.resumed, summary.seconds = bool(written.findings), written.resumed, written.seconds
    summary.files = read_manifest(written.folder)
    if verify == "none":
        return
    target = summary.plan.target
    summary.verified.append(verify_content(source, written.folder, target=target, workers=summary.workers))
    if verify == "logits":
        say("  verify    logits: running torch and Paddle on the same ids, both in float32")
        nonfinite = summary.nonfinite  # such weights were found and named
        result = verify_logits(source, written.folder, rounded_to=rounded_to, nonfinite_weights=nonfinite)
        summary.verified.append(result)
