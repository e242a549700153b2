"""Command-line options that `aquila-pd chat` and `aquila-pd generate` share."""

import argparse

from ..generation import Engine, SamplingParams
from ..generation.sampling_params import described
from ..text.engine_options import add_engine, engine_of

MAX_NEW_TOKENS = 512
SAMPLING = dict(top_k=15, top_p=0.9)  # BAAI's own defaults, where they differ from SamplingParams'


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
    """An option for each described field of SamplingParams, and --max-new-tokens."""
    for name, (kind, description) in described().items():
        option, default = f"--{name.replace('_', '-')}", SAMPLING.get(name, getattr(SamplingParams, name))
        metavar = "N" if kind is int else "X"
        parser.add_argument(
            option, type=kind, metavar=metavar, default=default, help=f"{description} (default: {default:g})"
        )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"at most so many (default: {MAX_NEW_TOKENS}, and at most half of what the model holds)",
    )


def sampling_of(args: argparse.Namespace, **more) -> SamplingParams:
    """SamplingParams of the options, and more. Raises GenerationError."""
    asked = {name: getattr(args, name) for name in (*described(), "seed")}
    if args.max_new_tokens is not None:
        asked["max_new_tokens"] = args.max_new_tokens
    return SamplingParams(**{**asked, **more})


def max_new_tokens(asked: int | None, engine: Engine) -> int:
    """As asked, or the default where it leaves half of what the engine holds to the prompt."""
    return min(MAX_NEW_TOKENS, max(engine.max_length // 2, 1)) if asked is None else asked
