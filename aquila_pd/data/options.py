"""argparse options shared by the `aquila-pd data` verbs, and the DataSpec they make."""

import argparse
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from ..runtime import base
from ..text.prompts import ChatPrompts
from ..tokenizer import AquilaTokenizer
from ..utils.errors import CheckpointError, ConfigError
from .settings import DEDUPLICATE, FORMATS, OVERLONG, DataSpec, Source

DEFAULT = {field.name: field.default for field in fields(DataSpec)}


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Options of a DataSpec, but for what becomes of long samples."""
    parser.add_argument(
        "files", nargs="+", metavar="FILES", help="rows: .jsonl, .json, .parquet; names, globs in quotes"
    )
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="of the rows (default: auto, row by row)")
    parser.add_argument(
        "--deduplicate",
        choices=DEDUPLICATE,
        default=DEFAULT["deduplicate"],
        help="drop rows that are the same as an earlier one, or nearly (default: %(default)s)",
    )
    parser.add_argument(
        "--near-threshold",
        type=float,
        default=DEFAULT["near_threshold"],
        metavar="SHARE",
        help="of runs of words that two rows share when one is nearly the other (default: %(default)s)",
    )
    _add_many(parser, "--language", "CODE", "only rows in this language, such as zh or en (default: all)")
    _add_many(parser, "--source", "NAME", "only rows of this source, a name or glob (default: all)")
    _add_many(parser, "--exclude-source", "NAME", "no rows of this source, a name or glob")
    _add_many(parser, "--contamination", "FILE", "a benchmark: rows that hold a piece of it are dropped")
    parser.add_argument("--keep-contaminated", action="store_true", help="count such rows and keep them")
    parser.add_argument(
        "--held-out", type=float, default=DEFAULT["held_out"], metavar="SHARE", help="of the rows, to evaluate on"
    )
    _add_many(parser, "--evaluate", "FILES", "rows to evaluate on; they are not trained on (default: none)")
    parser.add_argument(
        "--max-bad-lines",
        type=int,
        default=DEFAULT["max_bad_lines"],
        metavar="N",
        help="lines that cannot be read before the run stops (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides which rows are held out (default: 0)")


def _add_many(parser: argparse.ArgumentParser, name: str, metavar: str, text: str) -> None:
    parser.add_argument(name, action="append", default=[], metavar=metavar, help=f"{text}; may be given several times")


def add_model(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Options of prompts_of()."""
    parser.add_argument(
        "--model",
        required=required,
        metavar="DIR",
        help="whose tokenizer is used: a model's folder or GGUF file; its weights are not read"
        + ("" if required else " (default: nothing is counted in tokens)"),
    )
    parser.add_argument("--template", metavar="NAME", help="chat template (default: the one the model records)")


def add_overlong(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overlong",
        choices=OVERLONG,
        default=DEFAULT["overlong"],
        help="what becomes of rows longer than --length: cut into several samples at turn borders, cut off, or dropped "
        "(default: %(default)s)",
    )


def spec_of(args: argparse.Namespace) -> DataSpec:
    """The rows asked for. Raises DataError for values that cannot be."""
    return DataSpec(
        train=(Source(tuple(args.files), args.format),),
        evaluate=(Source(tuple(args.evaluate), args.format),) if args.evaluate else (),
        held_out=args.held_out,
        overlong=args.overlong,
        max_bad_lines=args.max_bad_lines,
        deduplicate=args.deduplicate,
        near_threshold=args.near_threshold,
        languages=tuple(args.language),
        sources=tuple(args.source),
        exclude_sources=tuple(args.exclude_source),
        contamination=tuple(args.contamination),
        drop_contaminated=not args.keep_contaminated,
    )


def prompts_of(args: argparse.Namespace) -> ChatPrompts | None:
    """How conversations are written for the model asked for; None without a model.

    Raises CheckpointError for a place that holds none, ConfigError and TokenizerError for what is in it.
    """
    if args.model is None:
        if args.template is not None:
            raise ConfigError("--template needs --model: a template is written with a model's tokens.")
        return None
    from ..text.loading import stop_ids_of  # which loads Paddle

    base.log_warnings_only()
    folder = Path(args.model)
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist. Give a model's folder or GGUF file.")
    tokenizer = AquilaTokenizer.from_pretrained(str(folder))
    return ChatPrompts(tokenizer, args.template, eos_ids=stop_ids_of(tokenizer, folder))


def checked_length(args: argparse.Namespace) -> int | None:
    """--length. Raises ConfigError for one that has no meaning."""
    if args.length is not None and args.length < 2:
        raise ConfigError(f"--length is {args.length}; samples of fewer than 2 tokens hold nothing to learn.")
    if args.length is not None and args.model is None:
        raise ConfigError("--length counts tokens, which needs --model.")
    return args.length


def lines_of(found: dict[str, str]) -> Iterator[str]:
    """`  name  what` for each, the names in one column."""
    width = max(map(len, found), default=0)
    yield from (f"  {name.ljust(width)}  {what}" for name, what in found.items())
