"""From rows to a chat with the tuned model, one command after the other, each printed as one would type it.

    python examples/sft_walk.py                           the model that `make demo` leaves, the rows beside this file
    python examples/sft_walk.py --model DIR --rows 'my/*.jsonl' --output DIR --question "..." stages.0.method=qlora

The rows teach one habit: answers of the form "In one word: Paris." The same question is asked before and after. Exit
status 0 when the loss on rows that were held out fell and the answer changed.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Path(__file__).with_suffix(".yaml")
ROWS = Path(__file__).with_name("walk_rows.jsonl")
MODEL = ROOT / "demo-output" / "SmolLM2-135M-Instruct-PD"
OUTPUT = ROOT / "demo-output" / "sft-walk"
QUESTION = "Which city is the capital of Hungary?"  # not among the rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder made by `aquila-pd convert`")
    parser.add_argument("--rows", nargs="+", default=[str(ROWS)], help="files of rows, or globs in quotes")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the folder for everything that is made")
    parser.add_argument("--question", default=QUESTION, help="to ask before and after")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="how to train")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="keys of the recipe to change")
    return parser.parse_intermixed_args()


def run(*words: object) -> None:
    """Run `aquila-pd WORDS` in this process, which saves loading Paddle each time, and end where it fails."""
    from aquila_pd.cli import main as aquila_pd

    typed = [str(word) for word in words]
    print(f"\n$ aquila-pd {shlex.join(typed)}", flush=True)
    status = aquila_pd(typed)
    if status:
        sys.exit(status)


def ask(model: Path, question: str, file: Path) -> str:
    """The likeliest answer of a model."""
    asked = ("--chat", "--prompt", question, "--temperature", 0, "--max-new-tokens", 48)
    run("generate", model, *asked, "--output", file, "--overwrite")
    answer = json.loads(file.read_text(encoding="utf-8"))["text"]
    print(f"  {answer}")
    return answer


def held_out_losses(log: Path) -> list[float]:
    """The loss on the rows held out, at each evaluation."""
    records = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return [record["loss"] for record in records if record["kind"] == "eval"]


def main() -> int:
    args = parse()
    if not (args.model / "config.json").is_file():
        sys.exit(f"{args.model} is no model folder. `make demo` makes the default one; --model takes another.")
    args.output.mkdir(parents=True, exist_ok=True)
    trained, tuned = args.output / "run", args.output / "model"
    files = f"stages.0.data.train.files={json.dumps([str(Path(rows).resolve()) for rows in args.rows])}"
    recipe = (args.recipe, f"model={args.model}", f"output={trained}", files, *args.changes)

    run("data", "stats", *args.rows, "--model", args.model)
    run("data", "preview", *args.rows, "--model", args.model, "--rows", 2)
    before = ask(args.model, args.question, args.output / "before.jsonl")
    run("sft", *recipe, "--prepare")  # rows that are prepared are counted in the dry run, others estimated
    run("sft", *recipe, "--dry-run")
    run("sft", *recipe)
    run("export", trained, "--output", tuned, "--overwrite")
    after = ask(tuned, args.question, args.output / "after.jsonl")
    run("to-torch", "--input", tuned, "--output", args.output / "model-HF", "--overwrite")

    losses = held_out_losses(trained / "log.jsonl")
    print(f"\nQuestion       {args.question}\nBefore         {before}\nAfter          {after}")
    print(f"Held-out loss  {losses[0]:.4f} before, {losses[-1]:.4f} after")
    print(f"Curve          {trained / 'curve.png'}\nTalk to it     aquila-pd chat {tuned}")
    return 0 if losses[-1] < losses[0] and before != after else 1


if __name__ == "__main__":
    sys.exit(main())
