"""`aquila-pd export`: a stage's result, or an adapter, as a plain model folder. Arguments only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..adapters.export import ONTO, copy_adapter, merge_folder
from ..adapters.peft_files import CONFIG as ADAPTER_CONFIG
from ..adapters.peft_files import open_adapter
from ..checkpoint.layout import CONFIG
from ..utils.command import run
from ..utils.errors import CheckpointError, ConfigError
from .run.folder import RunFolder
from .run.manifest import FILE, Manifest


@dataclass(frozen=True)
class Asked:
    """What is exported: a full model that was trained, or an adapter. template: the chat template of its stage."""

    model: Path | None
    adapter: Path | None
    template: str | None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="aquila-pd export",
        description="Make a plain model folder of what was trained. An adapter is merged into the files of its base. "
        "`aquila-pd chat` and PaddleNLP load the folder; `aquila-pd to-torch` brings it to Hugging Face.",
    )
    made.add_argument("source", type=Path, metavar="RUN_OR_ADAPTER", help="folder of a run, or of an adapter")
    made.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    made.add_argument(
        "--base", metavar="DIR", help="model the adapter was trained on (default: the folder that the adapter names)"
    )
    made.add_argument("--stage", metavar="NAME", help="of a run, whose result is wanted (default: the last)")
    made.add_argument(
        "--adapter",
        action="store_true",
        help="copy the adapter for transformers and peft and merge nothing; --base is then the model it shall name",
    )
    made.add_argument(
        "--onto",
        default=ONTO[0],
        choices=ONTO,
        help="trained: the weights the adapter was trained on, for QLoRA what NF4 left of them (default); "
        "original: those of the base as they are",
    )
    made.add_argument(
        "--template", metavar="NAME", help="chat template to record (default: the stage's, else the base's)"
    )
    made.add_argument("--workers", type=int, metavar="N", help="threads (default: the cores there are, at most 8)")
    made.add_argument(
        "--fsync", action="store_true", help="wait for the disk, so that the output survives a power failure"
    )
    made.add_argument("--overwrite", action="store_true", help="replace an earlier output once the new one is complete")
    return made


def main(argv: list[str] | None = None) -> int:
    """0 when the folder is there, 2 for wrong arguments, else as terminal.run() says."""
    args = parser().parse_args(argv)
    return run(lambda: _export(args), left=f"Nothing was left behind; {args.output} is as it was before.")


def _export(args: argparse.Namespace) -> None:
    asked = find(args.source, stage=args.stage)
    if args.adapter:
        if asked.adapter is None:
            raise ConfigError(f"{args.source} ended with a full model, which has no adapter. Leave --adapter out.")
        copy_adapter(asked.adapter, args.output, base=args.base)
        print(f"Copied the adapter to {args.output}.")
        return
    merge_folder(
        _base(asked, args.base),
        asked.adapter,
        args.output,
        onto=args.onto,
        template=args.template or asked.template,
        workers=args.workers,
        fsync=args.fsync,
        overwrite=args.overwrite,
        say=lambda line: print(line, flush=True),
    )


def find(source: Path, *, stage: str | None = None) -> Asked:
    """What lies in a folder: an adapter, or a run and in it the result of a stage, by default the last.

    Raises CheckpointError for any other folder and for a stage without a result, ConfigError for an unknown stage.
    """
    if (source / ADAPTER_CONFIG).is_file():
        if stage is not None:
            raise ConfigError(f"{source} is an adapter and has no stages. Leave --stage out.")
        return Asked(None, source, None)
    if not (source / FILE).is_file():
        what = "is a model already, with nothing to merge" if (source / CONFIG).is_file() else "is neither"
        raise CheckpointError(f"{source} {what}. Give the folder of a run (with {FILE}) or of an adapter.")
    manifest = Manifest.open(source)
    stages = {one.name: one for one in manifest.recipe.stages}
    name = next(reversed(stages)) if stage is None else stage
    if name not in stages:
        raise ConfigError(f"The run in {source} has no stage {name!r}. It has {', '.join(stages)}.")
    result = RunFolder(source).result(name)
    if not result.is_dir():
        done = [one for one in stages if RunFolder(source).result(one).is_dir()]
        other = f"--stage exports one that is done: {', '.join(done)}." if done else "No other is done."
        raise CheckpointError(f"Stage {name} of {source} has no result yet: let the run end first. {other}")
    adapter = result if (result / ADAPTER_CONFIG).is_file() else None
    return Asked(None if adapter else result, adapter, stages[name].template)


def _base(asked: Asked, given: str | None) -> Path:
    if asked.adapter is None:
        if given is not None:
            raise ConfigError(f"{asked.model} is a full model and needs no base. Leave --base out.")
        return asked.model
    named = given or open_adapter(asked.adapter).base
    if not named:
        raise ConfigError(f"{asked.adapter} does not say what it was trained on. Say so with --base.")
    return Path(named)
