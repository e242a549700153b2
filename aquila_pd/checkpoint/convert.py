"""From one checkpoint to another: plan, write, verify, appear. Torch to Paddle and back are two targets of one flow."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..architecture import families
from ..formats import safetensors
from ..formats.safetensors import INDEX, index_of, write_json
from ..utils.errors import CheckpointError, ConfigError, OutputError, printable
from ..utils.files import sync_tree
from .bundle import write_bundle
from .chat_template import Recorded, choose_template
from .describe import describe, describe_shards
from .estimate import estimate
from .hub import find_input
from .ids import GENERATION_CONFIG, check_vocabulary
from .io.journal import Journal, fingerprint
from .io.manifest import read_manifest, write_manifest
from .io.output import OF_THE_RUN, check_output
from .io.pipeline import count_workers
from .io.shard_writer import write_weights
from .io.staging import completed, staging, undo_killed
from .layout import CONFIG
from .plan import Plan, make_plan
from .report import Summary, check_report, closing_words, write_report
from .sources import Source, open_source
from .targets import PADDLE, PADDLENLP_LLAMA, TORCH, Target, find_target
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
        made_for = fingerprint(opened, plan)
        for line in _details(plan, workers) if dry_run else undo_killed(output, made_for):
            say(line)
        check_output(output, opened.path, overwrite=overwrite, nbytes=plan.nbytes)
        check_report(report_file, opened.path, output)
        if verify == "logits":
            check_logits_possible(opened)
        if dry_run:
            say("Dry run: nothing was written" + (", the report neither." if report_file else "."))
            return summary
        with staging(output, overwrite=overwrite, fsync=fsync, say=say) as stage:
            # again, now that no other run can be writing it
            check_output(output, opened.path, overwrite=overwrite, nbytes=plan.nbytes)
            journal = Journal(stage.folder, made_for)
            stage.finished, stage.count = lambda: journal.worth_keeping, len(plan.shards)
            _write(opened, journal, summary, tokenizer=Path(prepared), fsync=fsync, say=say)
            _verify(opened, stage.folder, summary, verify=verify, rounded_to=dtype, say=say)
    with completed(output):
        if report_file:
            write_report(report_file, summary)
        say(closing_words(summary))
    return summary


def _details(plan: Plan, workers: int) -> list[str]:
    return [describe_shards(plan), estimate(plan, workers=workers)]


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


def _write(
    source: Source, journal: Journal, summary: Summary, *, tokenizer: Path, fsync: bool, say: Callable[[str], None]
) -> None:
    """Weights with their index, then what makes the folder a model, then its manifest."""
    plan, folder, begin = summary.plan, journal.folder, time.monotonic()
    with _failures_of_the_disk(source, summary.output):
        journal.resume(workers=summary.workers, say=say)
        summary.resumed = len(journal.finished)
        findings = write_weights(source, plan, journal, workers=summary.workers, fsync=fsync)
        if len(plan.shards) > 1:
            write_json(folder / INDEX, index_of(plan.shards))
        write_json(folder / CONFIG, plan.config)
        write_json(folder / GENERATION_CONFIG, plan.generation)
        for path in sorted(tokenizer.iterdir()):  # one by one: copytree would copy the temporary folder's mode too
            shutil.copyfile(path, folder / path.name)
        if plan.target.bundle:
            write_bundle(folder)
        hashes = {file: finished.sha256 for file, finished in journal.finished.items()}
        write_manifest(folder, plan, hashes, without=set(OF_THE_RUN))
        _check_unchanged(source, plan, journal)
        if fsync:
            sync_tree(folder)
    for line in _as_lines(findings):
        say(line)
    summary.warnings += findings
    summary.nonfinite = bool(findings)
    summary.seconds = time.monotonic() - begin
    summary.files = read_manifest(folder)


def _check_unchanged(source: Source, plan: Plan, journal: Journal) -> None:
    if fingerprint(source, plan) != journal.made_for:
        raise CheckpointError(
            f"{source.path} changed while it was read: the output would be half of one model and half of another. "
            "Convert again when nobody writes to it any more."
        )


@contextmanager
def _failures_of_the_disk(source: Source, output: Path) -> Iterator[None]:
    """An error of the system while writing becomes an OutputError, unless it is about the source."""
    try:
        yield
    except BrokenPipeError:  # of the progress lines, whose reader is gone; no disk is at fault
        raise
    except OSError as error:
        if error.filename and source.path in [Path(error.filename), *Path(error.filename).parents]:
            raise  # the source cannot be read; the output is not to blame
        raise OutputError(
            f"Writing {output} failed: {error.strerror or error}.\nMake room, or choose another disk."
        ) from error


def _verify(
    source: Source, folder: Path, summary: Summary, *, verify: str, rounded_to: str | None, say: Callable[[str], None]
) -> None:
    if verify == "none":
        return
    target = summary.plan.target
    summary.verified.append(verify_content(source, folder, target=target, workers=summary.workers))
    if verify == "logits":
        say("  verify    logits: running torch and Paddle on the same ids, both in float32")
        nonfinite = summary.nonfinite  # such weights were found and named
        summary.verified.append(verify_logits(source, folder, rounded_to=rounded_to, nonfinite_weights=nonfinite))
