"""Entry point `aquila-pd VERB ...`: dispatches to the verb's module, which parses its own arguments.

Modules load only when their verb is asked for, so that the help costs nothing.
"""

import argparse
import importlib
import sys

from .runtime import versions
from .utils.errors import AquilaError

# verb -> the module whose main(argv) -> exit status does it (or module:function), and one line for the help
VERBS = {
    "convert": ("aquila_pd.checkpoint.command", "a torch checkpoint into a folder that PaddleNLP loads"),
    "to-torch": ("aquila_pd.checkpoint.command:to_torch", "a Paddle checkpoint back into a Hugging Face folder"),
    "inspect": ("aquila_pd.checkpoint.inspect", "what a checkpoint is, and what it would be converted to"),
    "verify": ("aquila_pd.checkpoint.verify.command", "prove that a converted folder is its torch checkpoint"),
    "chat": ("aquila_pd.chat.terminal", "talk to a converted model in the terminal"),
    "generate": ("aquila_pd.chat.batch", "continue prompts, or answer them, one or a file of them"),
    "serve": ("aquila_pd.serving.command", "a web service that OpenAI clients talk to, with a chat page"),
    "sft": ("aquila_pd.sft.command", "tune a model as a recipe says: rows, stages, result; goes on where it stopped"),
    "export": ("aquila_pd.sft.export_command", "what a run or an adapter has learned as a plain model folder"),
    "data": ("aquila_pd.data.command", "rows to fine-tune on: what is in them, what is learned, samples of them"),
    "doctor": ("aquila_pd.doctor", "installed versions beside the tested ones, this machine, and what to mend"),
}


def help_text() -> str:
    width = max(map(len, VERBS))
    lines = (f"  {verb.ljust(width)}  {line}" for verb, (_, line) in VERBS.items())
    return "verbs:\n" + "\n".join(lines) + "\n\n`aquila-pd VERB --help` explains a verb."


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return its exit status; a named error becomes one message and status 1."""
    parser = argparse.ArgumentParser(
        prog="aquila-pd",
        description="Aquila2 language models on PaddlePaddle.",
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{versions.NAME} {versions.VERSION}")
    parser.add_argument("verb", choices=list(VERBS), metavar="VERB", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the verb's own arguments")
    asked = parser.parse_args(argv)
    module, _, function = VERBS[asked.verb][0].partition(":")
    try:
        return getattr(importlib.import_module(module), function or "main")(asked.arguments)
    except AquilaError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
