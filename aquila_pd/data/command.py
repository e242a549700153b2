"""`aquila-pd data stats|preview|prepare`: statistics, label-mask preview, and tokenized samples of SFT rows."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

from ..utils.command import run
from ..utils.errors import DataError, OutputError, shown
from ..utils.progress import Bar, Timer
from ..utils.units import counted, duration
from .counters import Counters
from .encoding import Encoder, encode_all
from .options import add_model, add_overlong, add_rows, checked_length, lines_of, prompts_of, spec_of
from .pipeline import Conversation, conversations, data_files
from .prepare import Progress, prepare, readers_for, workers_for
from .preview import coloured, marked, segments_of
from .stats import QUANTILES, Stats, draw_lengths, histogram, quantile
from .targets import knows_system
from .truncation import Fitted

TEXT = "Rows of conversations: what is in them, what is learned of them, and samples made of them."
NOTES = """\
Rows are those of Infinity-Instruct, OpenAI messages, alpaca, or PaddleNLP's src and tgt. Files of several weights, and
stages with files of their own, are written in a recipe (`aquila-pd sft`), which prepares its data by itself."""
WIDE = 100  # columns of tables where there is no terminal


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="aquila-pd data", description=TEXT, epilog=NOTES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = made.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text, add in (
        ("stats", "counts, and how long samples are", _add_stats),
        ("preview", "rows as text, with what is learned of them", _add_preview),
        ("prepare", "a folder of samples to train on", _add_prepare),
    ):
        verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_rows(verb)
        add(verb)
    return made


def _add_stats(parser: argparse.ArgumentParser) -> None:
    add_model(parser, required=False)
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sample at most (default: no limit)")
    add_overlong(parser)
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw how long samples are (default: as text)")
    _add_workers(parser)


def _add_preview(parser: argparse.ArgumentParser) -> None:
    add_model(parser, required=True)
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sample at most (default: no limit)")
    add_overlong(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rows", type=int, default=3, metavar="N", help="show the first so many (default: 3)")
    which.add_argument("--row", metavar="[FILE:]NUMBER", help="show this row of the file, from 1")
    which.add_argument("--id", metavar="ID", help="show the row with this id")
    parser.add_argument("--tokens", action="store_true", help="show the borders of tokens")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    add_model(parser, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--length", type=int, required=True, metavar="N", help="tokens of a sample at most")
    add_overlong(parser)
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one for each core, up to 8, and 1 for few rows)"
    )


def main(argv: list[str] | None = None) -> int:
    """0, or 1 for an error a person can mend, else as checkpoint.terminal.run() says."""
    args = parser().parse_args(argv)
    verb = {"stats": show_stats, "preview": show_rows, "prepare": make}[args.verb]
    return run(lambda: verb(args))


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _console():
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


class _Waiting:
    """Progress of work of unknown size: a line on a terminal that is redrawn, lines at intervals elsewhere; on stderr.

    A context manager; leaving removes the line.
    """

    def __init__(self) -> None:
        self._timer, self._bar = Timer(), Bar("reading")

    def __enter__(self) -> "_Waiting":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __call__(self, text: str) -> None:
        self._bar.update(text)
        if not self._bar.is_drawn and self._timer.due():
            _note(f"  {text}")

    @property
    def seconds(self) -> float:
        return self._timer.seconds


# ------------------------------------------------------------------------------------------------ stats


def show_stats(args: argparse.Namespace) -> None:
    spec, length = spec_of(args), checked_length(args)
    if args.picture is not None and not args.picture.parent.is_dir():
        raise OutputError(f"{args.picture.parent} is no folder, so no picture can be written there.")
    prompts = prompts_of(args)
    stats = Stats("characters" if prompts is None else "tokens")
    files = len(data_files(spec))
    rows = conversations(
        spec,
        args.seed,
        counters=stats.counters,
        knows_system=prompts is None or knows_system(prompts),
        note=_note,
        workers=readers_for(spec, args.workers),
    )
    with closing(rows), _Waiting() as waiting:
        for number, (conversation, fitted) in enumerate(_fitted(rows, args, prompts, length), 1):
            stats.add(conversation, fitted)
            waiting(f"{counted(number, 'row')}, file {conversation.file + 1} of {files}")
    _print_stats(stats)
    if args.picture is not None:
        draw_lengths(stats, args.picture, limit=length)
        print(f"\nThe lengths are drawn in {args.picture}.")


def _fitted(
    rows: Iterator[Conversation], args: argparse.Namespace, prompts, length: int | None
) -> Iterator[tuple[Conversation, Fitted | None]]:
    """Conversations with their samples, or with None where there is no tokenizer."""
    if prompts is None:
        yield from ((conversation, None) for conversation in rows)
        return
    encoder = Encoder(prompts, length, args.overlong)
    with closing(encode_all(encoder, rows, workers=workers_for(args.workers))) as batches:
        for batch in batches:
            yield from batch


def _print_stats(stats: Stats) -> None:
    from rich.table import Table

    console = _console()
    rules = Table(title="Rules", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name, justify in (("rows", "right"), ("rule", "left"), ("", "left"), ("meaning", "left")):
        rules.add_column(name, justify=justify)
    for rule, rows in stats.counters:
        if rows:
            rules.add_row(f"{rows:,}", rule.name, rule.effect, rule.meaning)
    console.print(rules)
    head, *rows = stats.table()
    amounts = Table(title="\nWhat is left", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(head):
        amounts.add_column(name, justify="right" if number else "left")
    for row in rows:
        amounts.add_row(*row)
    console.print(amounts)
    sources = stats.largest_sources()
    if sources:
        print("\nSources")
        print("\n".join(lines_of({shown(name): f"{count:,}" for name, count in sources})))
    print(f"\n{'Samples' if stats.unit == 'tokens' else 'Rows'} by their length in {stats.unit}")
    print("\n".join(f"  {line}" for line in histogram(stats.lengths)))
    shares = (f"{of:.0%} up to {quantile(stats.lengths, of):,}" for of in QUANTILES)
    print(f"  {', '.join(shares)}")


# ------------------------------------------------------------------------------------------------ preview


def show_rows(args: argparse.Namespace) -> None:
    spec, length, prompts = spec_of(args), checked_length(args), prompts_of(args)
    names = [str(file.path) for file in data_files(spec)]
    is_wanted, limit = _wanted(args, names)
    rows = conversations(spec, args.seed, counters=Counters(), knows_system=knows_system(prompts), note=_note)
    console, encoder, count = _console(), Encoder(prompts, length, args.overlong), 0
    with closing(rows):
        for conversation in islice(filter(is_wanted, rows), limit):
            _show(console, conversation, encoder, name=names[conversation.file], borders=args.tokens)
            count += 1
    if not count:
        raise DataError(
            "No such row is left. Is it in these files, and did a rule drop it? `aquila-pd data stats` counts what "
            "each rule drops."
        )


def _wanted(args: argparse.Namespace, names: list[str]) -> tuple[Callable[[Conversation], bool], int]:
    """Which rows are shown, and how many at most. Raises DataError for a row that cannot be named so."""
    if args.id is not None:
        return (lambda row: row.id == args.id), 1
    if args.row is None:
        if args.rows < 1:
            raise DataError(f"--rows is {args.rows}; ask for at least 1.")
        return (lambda row: True), args.rows
    found = re.fullmatch(r"(?:(?P<file>.+):)?(?P<number>[1-9][0-9]*)", args.row)
    if not found:
        raise DataError(f"--row {args.row} is no [FILE:]NUMBER; rows are counted from 1.")
    files = [i for i, name in enumerate(names) if found["file"] in (None, name, Path(name).name)]
    if len(files) != 1:
        what = "is none of the files" if not files else "may be in any of several files"
        raise DataError(f"--row {args.row} {what}. Name it as FILE:NUMBER; the files are:\n  " + "\n  ".join(names))
    return (lambda row: (row.file, row.number) == (files[0], int(found["number"]))), 1


def _show(console, conversation: Conversation, encoder: Encoder, *, name: str, borders: bool) -> None:
    from rich.text import Text

    (fitted,) = encoder.encode([conversation])
    facts = [f"id {shown(conversation.id)}"] if conversation.id else []
    facts += [f"source {shown(conversation.source)}"] if conversation.source else []
    facts += ["held out"] if conversation.held_out else []
    facts += [rule.name for rule in fitted.rules] + ([fitted.reason] if fitted.reason else [])
    title = f"{shown(name)}:{conversation.number}" + (f"  ({', '.join(facts)})" if facts else "")
    console.print(Text(title, style="bold"), soft_wrap=True)
    for number, (messages, sample) in enumerate(fitted.parts, 1):
        of = f"sample {number} of {len(fitted.parts)}: " if len(fitted.parts) > 1 else ""
        console.print(Text(f"{of}{counted(len(sample.ids), 'token')}, {sample.labels:,} learned", style="italic"))
        segments = segments_of(encoder.prompts, messages)
        if console.color_system is None:
            console.print(Text(marked(segments, borders=borders)), soft_wrap=True)
        else:
            console.print(Text.assemble(*coloured(segments, borders=borders)), soft_wrap=True)
    console.print()


# ------------------------------------------------------------------------------------------------ prepare


def make(args: argparse.Namespace) -> None:
    spec, length, prompts = spec_of(args), checked_length(args), prompts_of(args)
    files = data_files(spec)
    nbytes = sum(file.path.stat().st_size for file in files)
    plan = {
        "reads": f"{counted(len(files), 'file')}, {nbytes / 1e6:,.1f} MB",
        "writes": f"{args.output}, samples of up to {length:,} tokens, template {prompts.name}",
    }
    print("\n".join(lines_of(plan)), flush=True)

    with _Waiting() as waiting:
        summary = prepare(
            spec,
            prompts,
            length=length,
            seed=args.seed,
            folder=args.output,
            workers=args.workers,
            progress=lambda done: waiting(_words(done)),
            note=_note,
        )
    print("\n".join(f"  {line}" for line in summary.counters.lines()))
    how = "was there already, of the same inputs" if summary.is_reused else f"made in {duration(waiting.seconds)}"
    print(f"{args.output}: {_said(summary.train)}{_held_out(summary.held_out)}; {how}.")


def _words(done: Progress) -> str:
    return f"{done.rows:,} rows, {done.samples:,} samples, {done.tokens:,} tokens, file {done.file} of {done.files}"


def _said(part: dict) -> str:
    rows, samples, tokens = (counted(part[key], key.removesuffix("s")) for key in ("rows", "samples", "tokens"))
    return f"{rows}, {samples}, {tokens}, {part['targets'] / part['tokens']:.1%} of them learned"


def _held_out(part: dict | None) -> str:
    return f"; held out: {_said(part)}" if part else ""
