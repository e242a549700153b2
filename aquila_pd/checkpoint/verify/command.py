"""Command line of the verification (convert/verify.py, `aquila-pd verify`): arguments and report path."""

import argparse
import os
from pathlib import Path

from ...architecture.families import AUTO, FAMILIES
from ...utils.command import run
from ...utils.errors import OutputError
from ...utils.files import write_json, write_text
from ..hub import find_input
from ..sources import open_source
from .evidence import LEVELS, MADE_BY, Evidence, as_data, prove
from .page import page

DESCRIPTION = "Prove that a converted folder is the torch checkpoint it was made from."
PAGES = (".html", ".htm")
HEAD = 4096  # bytes in which an earlier report of ours names its maker


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=DESCRIPTION)
    made.add_argument("--torch", required=True, help="the source: whatever `convert` reads, a folder or a .gguf file")
    made.add_argument("--paddle", required=True, type=Path, help="the folder converted from it")
    made.add_argument(
        "--level",
        default="content",
        choices=LEVELS,
        help="content: compare every value (default); logits: run both models, each whole in float32; layerwise: run "
        "both one layer at a time, with the drift of every layer, for models that do not fit into memory. Each begins "
        "with config.json and the headers",
    )
    made.add_argument("--prompt", help="text for logits and layerwise (default: fixed pseudo-random token ids)")
    made.add_argument(
        "--family", default=AUTO, choices=[AUTO, *FAMILIES], help="how to read the source's config.json (default: auto)"
    )
    made.add_argument(
        "--report", type=Path, metavar="FILE", help="write what was found as .json or .html (default: no file)"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 proven, 1 not proven or unreadable, 2 wrong arguments, else that of command.run()."""
    made = parser()
    args = made.parse_args(argv)
    if args.prompt is not None and args.level == "content":
        made.error("--prompt is for --level logits and layerwise; content runs no model")
    if args.report and args.report.suffix.lower() not in (".json", *PAGES):
        made.error(f"--report {args.report}: the name must end in .json or .html")
    return run(lambda: _prove(args), left="Nothing was written.")


def _prove(args: argparse.Namespace) -> None:
    with open_source(find_input(args.torch), args.family) as source:
        if args.report:
            check_report(args.report, source.path, args.paddle)
        print(f"torch     {source.path} ({source.layout.kind}, family {source.family.name})")
        print(f"paddle    {args.paddle}")
        for note in source.notes:
            print(f"  note      {note}")
        evidence = prove(source, args.paddle, level=args.level, prompt=args.prompt)
        if args.report:
            write_report(args.report, evidence)
            print(f"report    {args.report}")
    if evidence.failure:
        raise evidence.failure
    print(f"Proven: {evidence.sentence}.")


def check_report(path: Path, *compared: Path) -> None:
    """Preflight of the report path: raise OutputError for an unwritable one or one that would replace another file."""
    place = path.resolve()
    for other in (folder.resolve() for folder in compared):
        if other in [place, *place.parents]:
            raise OutputError(f"The report {path} lies in {other}, which is only read. Choose another place.")
    if not (place.parent.is_dir() and os.access(place.parent, os.W_OK | os.X_OK)):
        raise OutputError(f"The report {path} cannot be written: {place.parent} is no folder one may write to.")
    if place.exists() and not _is_report(place):
        raise OutputError(f"The report {path} would replace what is no earlier report. Choose another name.")


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MADE_BY.encode() in file.read(HEAD)


def write_report(path: Path, evidence: Evidence) -> None:
    """Raises OutputError when the disk refuses."""
    found = as_data(evidence)
    try:
        if path.suffix.lower() in PAGES:
            write_text(path, page(found))
        else:
            write_json(path, found)
    except OSError as error:
        verdict = f"The verdict is: {found['verdict']}. {evidence.sentence}"
        raise OutputError(f"The report {path} could not be written: {error.strerror or error}.\n{verdict}") from error
