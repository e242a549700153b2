"""Command-line options of the engine: chunked prefill and prefix caching, the same for serve, generate and chat."""

import argparse


def count(text: str) -> int:
    """argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of things; a whole number from 1")
    return int(text)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Options of the scheduler, named as vLLM's users know them."""
    parser.add_argument(
        "--prefill-chunk",
        type=count,
        default=512,
        metavar="N",
        help="prompt tokens computed in one step, all prompts together; fewer delay the answers that run less, more "
        "read a long prompt faster (default: 512)",
    )
    parser.add_argument(
        "--no-prefix-caching",
        dest="prefix_reuse",
        action="store_false",
        help="compute every prompt from its first token (default: start from keys and values of earlier prompts and "
        "answers that begin alike)",
    )


def engine_of(args: argparse.Namespace) -> dict:
    """The options as arguments of load() and Engine."""
    return dict(prefill_chunk=args.prefill_chunk, prefix_reuse=args.prefix_reuse)
