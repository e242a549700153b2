"""The command lines of the converter: convert/torch2paddle.py and convert/paddle2torch.py. Arguments only."""

import argparse
from pathlib import Path

from ..architecture.families import AUTO, FAMILIES
from ..formats.safetensors import DEFAULT_SHARD_SIZE
from ..tokenization.chat_templates import TEMPLATES
from ..utils.command import run
from .convert import VERIFICATIONS, convert
from .plan import TAGS
from .targets import PADDLE, TORCH, architectures

TO_PADDLE = "Convert a torch checkpoint (safetensors, .bin, GGUF, GPTQ, AWQ, NF4) into a folder that PaddleNLP loads."
TO_TORCH = "Convert a Paddle checkpoint back into a Hugging Face folder, as LLaMA unless told otherwise."
INPUTS = {
    PADDLE: "folder with config.json and weights, a .gguf file, or the id of a model on the Hugging Face hub",
    TORCH: "folder with config.json and Paddle safetensors: converted, fine-tuned, or the published Paddle release",
}
ARCHITECTURES = {
    PADDLE: "of the output: aquila, our decoder (default), or llama, PaddleNLP's own LlamaForCausalLM",
    TORCH: "of the output: llama, which vLLM and llama.cpp take (default), or aquila, for what knows AquilaForCausalLM",
}


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty name; write . for the current folder")
    return Path(text)


def parser(framework: str) -> argparse.ArgumentParser:
    """The argument parser of the conversion to a framework."""
    made = argparse.ArgumentParser(description=TO_PADDLE if framework == PADDLE else TO_TORCH)
    made.add_argument("--input", required=True, help=INPUTS[framework])
    made.add_argument("--output", required=True, type=_folder, help="folder to make")
    made.add_argument("--dtype", choices=list(TAGS), help="of the output (default: as stored; quantized: float32)")
    made.add_argument("--architecture", choices=architectures(framework), help=ARCHITECTURES[framework])
    made.add_argument(
        "--max-shard-size", default=DEFAULT_SHARD_SIZE, metavar="SIZE", help="such as 5GB, 500MB, 2GiB (default: 5GB)"
    )
    made.add_argument(
        "--family", default=AUTO, choices=[AUTO, *FAMILIES], help="how to read config.json (default: auto, by itself)"
    )
    if framework == PADDLE:
        made.add_argument(
            "--chat-template",
            default=AUTO,
            metavar="NAME",
            help=f"to record: {', '.join(TEMPLATES)} (default: auto, the source's own, else by name or sizes)",
        )
    made.add_argument(
        "--verify",
        default="content",
        choices=[kind for kind in VERIFICATIONS if framework == PADDLE or kind != "logits"],
        help="content: read every value again and compare (default); none"
        + ("; logits: content, and run torch beside Paddle, both in float32" if framework == PADDLE else ""),
    )
    made.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads (default: the cores there are, at most 8)",
    )
    made.add_argument(
        "--fsync",
        action="store_true",
        help="wait for the disk after each shard and at the end, so that what is finished survives a power failure "
        "(default: leave that to the system, as cp does)",
    )
    made.add_argument("--report", type=Path, metavar="FILE.json", help="write what was done as JSON (default: no file)")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier output once the new one is complete")
    made.add_argument(
        "--dry-run", action="store_true", help="print the plan and its shards, check everything, write nothing"
    )
    return made


def main(argv: list[str] | None = None, *, framework: str = PADDLE) -> int:
    """Exit status: 0 converted and verified, 2 wrong arguments, else that of command.run()."""
    args = parser(framework).parse_args(argv)
    return run(lambda: _convert(args, framework), left=f"Nothing was left behind; {args.output} is as it was before.")


def to_torch(argv: list[str] | None = None) -> int:
    """paddle2torch."""
    return main(argv, framework=TORCH)


def _convert(args: argparse.Namespace, framework: str) -> None:
    convert(
        args.input,
        args.output,
        framework=framework,
        architecture=args.architecture,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        family=args.family,
        chat_template=getattr(args, "chat_template", AUTO),
        verify=args.verify,
        workers=args.workers,
        fsync=args.fsync,
        report_file=args.report,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
    )
