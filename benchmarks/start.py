"""Starting: the import and the help beside an empty Python, the first token of `aquila-pd generate` beside
transformers.

    python benchmarks/start.py TORCH_FOLDER [PADDLE_FOLDER]

TORCH_FOLDER: a model transformers loads, with its tokenizer and a chat template, such as `aquila-pd to-torch` makes of
the model of `make demo`. PADDLE_FOLDER: the same model for us (default: converted here). Whole commands, each in a
process of its own, in turn: imports, tokenizer, weights, prompt and one token.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from harness import compare, forget, machine, run, write_json  # noqa: E402

QUESTION = "What is gravity?"
TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(2)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
messages = [{"role": "user", "content": sys.argv[2]}]
features = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(**features, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(ids[0, features["input_ids"].shape[1] :]))
"""
GENERATE = ("--chat", "--prompt", QUESTION, "--max-new-tokens", "1", "--temperature", "0")


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch_folder", type=Path)
    parser.add_argument("paddle_folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the weights from the system's memory before each run")
    parser.add_argument("--json", type=Path, help="write the runs here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        ours = args.paddle_folder or Path(work) / "ours"
        if args.paddle_folder is None:
            run(python(ROOT / "convert" / "torch2paddle.py", "--input", args.torch_folder, "--output", ours))
        print(f"{args.torch_folder.name}; {machine()}")
        small = compare(
            {
                "python -c pass": lambda: run(python("-c", "pass")),
                "import aquila_pd": lambda: run(python("-c", "import aquila_pd"), {"PYTHONPATH": str(ROOT)}),
                "aquila-pd --help": lambda: run(python("-m", "aquila_pd.cli", "--help"), {"PYTHONPATH": str(ROOT)}),
            },
            rounds=args.rounds,
            base="python -c pass",
        )
        large = compare(commands(args.torch_folder, ours, cold=args.cold), rounds=args.rounds, base="transformers")
    write_json(args.json, {**small, **large}, model=args.torch_folder.name, cold=args.cold)


def commands(theirs: Path, ours: Path, *, cold: bool) -> dict:
    """Each side whole, and only its imports."""

    def made(folder: Path | None, *arguments: object):
        def started():
            if cold and folder is not None:
                forget(folder)
            return run(python(*arguments), {"PYTHONPATH": str(ROOT)})

        return started

    imports = "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
    return {
        "transformers": made(theirs, "-c", TRANSFORMERS, theirs, QUESTION),
        "transformers, import only": made(None, "-c", imports),
        "aquila-pd generate": made(ours, "-m", "aquila_pd.cli", "generate", ours, *GENERATE),
        "aquila-pd generate, import only": made(None, "-c", "import aquila_pd.chat.batch"),
    }


if __name__ == "__main__":
    main()
