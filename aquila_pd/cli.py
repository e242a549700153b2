"""`aquila-pd VERB ...`: finds the verb's module and hands over. Each verb parses its own arguments.

Modules load only when their verb is asked for, so that the help costs nothing.
"""

import argparse
import importlib
import sys

from . import versions
from .errors import AquilaError

# verb -> the module whose main(argv) -> exit status does it, and one line for the help
VERBS = {
    "convert": ("aquila_pd.checkpoint.command", "a Hugging Face folder or GGUF file into one that PaddleNLP loads"),
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
    module, _ = VERBS[asked.verb]
    try:
        return importlib.import_module(module).main(asked.arguments)
    except AquilaError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
