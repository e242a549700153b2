"""`aquila-pd sft`: data preparation, training and export of a recipe in one run folder; resumes where it stopped."""

import argparse
import os
import sys
from pathlib import Path
from shlex import quote

from ..runtime import base
from ..utils.command import run as run_command
from ..utils.errors import AquilaError, RecipeError, TrainingError
from .recipe.load import Recipe, load_recipe
from .run import launch
from .run.folder import RunFolder
from .run.manifest import Manifest
from .run.preflight import alone, check, compare_with_run, open_manifest, prepare_all

PREPARED_BY = "AQUILA_PD_SFT_PREPARED"  # set for the ranks that this command starts: all before training is done


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="aquila-pd sft",
        description="Tune a model as a recipe says: prepare its rows, train its stages one after the other, write the "
        "result. Killed or stopped, the same command goes on where it was.",
        epilog="Examples: `aquila-pd sft recipes/tiny.yaml`, `aquila-pd sft recipes/tiny.yaml output=runs/2 "
        "'stages.*.optim.lr=2e-5' --dry-run`, `aquila-pd sft runs/2`.",
    )
    made.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, or the folder of a run to go on with")
    made.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="keys of the recipe to change, by their path")
    made.add_argument("--dry-run", action="store_true", help="say what would be done and what it takes, and do nothing")
    made.add_argument("--prepare", action="store_true", help="prepare the rows of all stages, and stop there")
    made.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="to train with on this machine (default: one for each GPU; on a CPU one)",
    )
    made.add_argument("--threads", type=int, metavar="N", help="of the mathematics (default: the cores, shared out)")
    made.add_argument("--workers", type=int, metavar="N", help="processes that prepare rows (default: the cores)")
    made.add_argument(
        "--tokens-per-s",
        type=float,
        metavar="X",
        help="for the time that --dry-run says: tokens a device was measured to train on (default: from its peak)",
    )
    made.add_argument("--device", metavar="NAME", help="for --dry-run: a card that is not here, such as A100-80GB")
    return made


def main(argv: list[str] | None = None) -> int:
    """0 when all stages are done, 1 for what a person can mend, 2 for wrong arguments, 128 + n for signal n."""
    args = parser().parse_intermixed_args(argv)
    if launch.ranks() > 1:
        launch.leave(run_command(lambda: _run_rank(args)))
    return run_command(lambda: _run(args))


# ---------------------------------------------------------------------------------------------- before training


def _run(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.recipe, args.changes)
    if args.dry_run:
        return _dry_run(args, recipe)
    gpus, processes = _devices(args)
    run = RunFolder(Path(recipe.output))
    check(recipe, run, devices=processes)
    with alone(run.root) as lock:
        manifest = open_manifest(recipe, run, devices=processes)
        prepare_all(recipe, run, manifest, workers=args.workers)
        if args.prepare:
            print(f"The rows of all stages are prepared. Train on them with\n  aquila-pd sft {quote(str(run.root))}")
            return 0
        if processes == 1:
            return _train(args, recipe)
        return _start_ranks(args, run, processes, on_gpus=gpus > 0, lock=lock)


def read_recipe(source: Path, changes: list[str]) -> Recipe:
    """The recipe of a YAML file, or that of a run folder, changed. Raises RecipeError, TrainingError."""
    if not source.is_dir():
        return load_recipe(source, changes)
    recipe = Manifest.open(source).recipe
    if changes:
        raise RecipeError(
            f"{source} is the folder of a run, which goes on as it was. To change keys that may be changed, give the "
            "recipe's file and the changes."
        )
    if Path(recipe.output).resolve() != source.resolve():  # the folder was moved
        raise RecipeError(
            f"{source} is a run that was made as {recipe.output}. Go on with it by its recipe: output=..."
        )
    return recipe


def _devices(args: argparse.Namespace) -> tuple[int, int]:
    """(GPUs here, processes to train with). Raises TrainingError for a number that cannot be."""
    import paddle

    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    processes = args.processes if args.processes is not None else max(gpus, 1)
    launch.check_processes(processes, gpus=gpus)
    return gpus, processes


def _dry_run(args: argparse.Namespace, recipe: Recipe) -> int:
    from ..data.prepare import TRAIN
    from .estimate.dry_run import dry_run
    from .estimate.stage import Machine

    run = RunFolder(Path(recipe.output))
    if args.device:
        machine = Machine.named(args.processes or 1, args.device)
    else:
        machine = Machine.here(_devices(args)[1])

    def prepared(stage: str) -> Path | None:
        folder = run.data(stage) / TRAIN
        return folder if folder.is_dir() else None

    found = dry_run(recipe, machine, prepared=prepared, tokens_per_s=args.tokens_per_s)
    try:
        found.notes += compare_with_run(recipe, run, devices=machine.devices)
    except AquilaError as error:
        found.findings.append(str(error))
    print(found.text)
    return 1 if found.findings else 0


# ------------------------------------------------------------------------------------------------- training


def _start_ranks(args: argparse.Namespace, run: RunFolder, processes: int, *, on_gpus: bool, lock: int) -> int:
    command = [sys.executable, "-m", "aquila_pd.cli", "sft", str(run.root)]
    command += [] if args.threads is None else ["--threads", str(args.threads)]
    os.environ[PREPARED_BY] = str(os.getpid())
    return launch.run_together(command, processes, on_gpus=on_gpus, logs=run.ranks, held=[lock])


def _run_rank(args: argparse.Namespace) -> int:
    """Train as one of several ranks. Of ranks that another launcher started, the first holds the run folder's lock."""
    recipe = _recipe_of_run(args)
    if PREPARED_BY in os.environ or launch.rank() > 0:
        return _train(args, recipe)
    with alone(Path(recipe.output)):
        open_manifest(recipe, RunFolder(Path(recipe.output)), devices=launch.ranks())
        return _train(args, recipe)


def _recipe_of_run(args: argparse.Namespace) -> Recipe:
    """The recipe that a rank trains by. Raises TrainingError for a run that is not prepared."""
    recipe = read_recipe(args.recipe, args.changes)
    if PREPARED_BY in os.environ:
        return recipe
    manifest = Manifest.open(Path(recipe.output))
    unready = [name for name, facts in manifest.content["stages"].items() if not facts.get("data")]
    if unready:
        raise TrainingError(
            f"The rows of {', '.join(unready)} are not prepared, which one process does before all others start:\n"
            f"  aquila-pd sft {args.recipe} {' '.join(args.changes)} --prepare"
        )
    return recipe


def _train(args: argparse.Namespace, recipe: Recipe) -> int:
    from ..text.loading import use_threads
    from ..utils import cores

    base.log_warnings_only()
    local = int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))
    use_threads(args.threads if args.threads is not None else max(1, cores.count() // local))
    from .loop.trainer import Stopped
    from .run.stages import train

    run = RunFolder(Path(recipe.output))
    try:
        train(recipe, run, Manifest.open(run.root))
    except Stopped as stopped:
        if launch.rank() == 0:
            print(
                f"Stopped; all that was learned is kept. Go on with:\n  aquila-pd sft {quote(str(run.root))}",
                file=sys.stderr,
            )
        return 128 + stopped.number
    if launch.rank() == 0:
        print(last_words(recipe, run))
    return 0


def last_words(recipe: Recipe, run: RunFolder) -> str:
    """What a person does next."""
    folder = run.model if run.model.is_dir() else run.result(recipe.stages[-1].name)
    root, tuned = quote(str(run.root)), quote(str(folder))
    talk = f"  aquila-pd chat {tuned}" if run.model.is_dir() else f"  aquila-pd export {root} --output DIR"
    return f"Done. The tuned model is in {folder}; everything about the run is in {run.root}.\n{talk}"
