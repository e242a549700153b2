"""Command-line options that `aquila-pd chat` and `aquila-pd generate` share."""

import argparse

from ..generation import Engine, SamplingParams
from ..text.engine_options import add_engine, engine_of

MAX_NEW_TOKENS = 512
SAMPLING = dict(temperature=1.0, top_k=15, top_p=0.9)  # BAAI's own


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Options of load(): model, chat template, engine."""
    parser.add_argument("folder", metavar="DIR", help="a folder made by `aquila-pd convert`")
    parser.add_argument("--template", metavar="NAME", help="chat template (default: the one the folder records)")
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16, float16 (default: see from_pretrained)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of prompt and answer (default: the model's context length)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of the mathematics (default: the cores there are)")
    add_engine(parser)


def loading_of(args: argparse.Namespace) -> dict:
    """The options as arguments of load(), without the folder."""
    asked = dict(template=args.template, dtype=args.dtype, max_length=args.max_length, threads=args.threads)
    return {**asked, **engine_of(args)}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Sampling options."""
    parser.add_argument(
        "--temperature", type=float, default=SAMPLING["temperature"], help="0 takes the likeliest token (default: 1)"
    )
    parser.add_argument(
        "--top-k", type=int, default=SAMPLING["top_k"], help="of so many likeliest tokens; 0: of all (default: 15)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=SAMPLING["top_p"],
        help="of the likeliest tokens with this share of the probability; 1: of all (default: 0.9)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"at most so many (default: {MAX_NEW_TOKENS}, and at most half of what the model holds)",
    )


def sampling_of(args: argparse.Namespace, **more) -> SamplingParams:
    """SamplingParams of the options, and more. Raises GenerationError."""
    asked = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    if args.max_new_tokens is not None:
        asked["max_new_tokens"] = args.max_new_tokens
    return SamplingParams(**{**asked, **more})


def max_new_tokens(asked: int | None, engine: Engine) -> int:
    """As asked, or the default where it leaves half of what the engine holds to the prompt."""
    return min(MAX_NEW_TOKENS, max(engine.max_length // 2, 1)) if asked is None else asked
