"""The converter's command line, for convert/torch2paddle.py and `aquila-pd convert`. Arguments only."""

import argparse
import sys
from pathlib import Path

from ..errors import AquilaError
from ..families import AUTO, FAMILIES
from ..shards import DEFAULT_SHARD_SIZE
from .convert import VERIFICATIONS, convert
from .plan import TAGS

DESCRIPTION = "Convert a Hugging Face folder or a GGUF file into a folder that PaddleNLP loads."
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=DESCRIPTION)
    made.add_argument("--input", required=True, type=Path, help="folder with config.json and weights, or a .gguf file")
    made.add_argument("--output", required=True, type=Path, help="folder to make")
    made.add_argument("--dtype", choices=list(TAGS), help="of the output (default: as stored; quantized: float32)")
    made.add_argument(
        "--max-shard-size", default=DEFAULT_SHARD_SIZE, metavar="SIZE", help="such as 5GB, 500MB, 2GiB (default: 5GB)"
    )
    made.add_argument(
        "--family", default=AUTO, choices=[AUTO, *FAMILIES], help="how to read config.json (default: auto, by itself)"
    )
    made.add_argument(
        "--verify",
        default="content",
        choices=VERIFICATIONS,
        help="content: read every value again and compare (default); logits: that, and run torch beside Paddle, both "
        "in float32 (needs memory for a float32 model); none",
    )
    made.add_argument("--report", type=Path, metavar="FILE.json", help="write what was done as JSON (default: no file)")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier output once the new one is complete")
    made.add_argument("--dry-run", action="store_true", help="print the plan, check everything, write nothing")
    return made


def main(argv: list[str] | None = None) -> int:
    """0 when converted and verified, 1 for an error a person can mend, 2 for wrong arguments, 130 for Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        convert(
            args.input,
            args.output,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            family=args.family,
            verify=args.verify,
            report_file=args.report,
            overwrite=args.overwrite,
            dry_run=args.dry_run,
        )
    except AquilaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a file of the source that may not be read, a disk that fails
        print(f"error: {error}. Nothing was left behind; {args.output} is as it was before.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Interrupted. Nothing was left behind; {args.output} is as it was before.", file=sys.stderr)
        return INTERRUPTED
    return 0
