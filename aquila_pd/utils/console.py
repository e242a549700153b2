"""Console of the chat commands: answers, notes, errors; notes are dim on a terminal, plain elsewhere.

What a model or a file says cannot steer the terminal: control characters, and those that turn the direction of
writing, are shown as signs.
"""

import sys
from contextlib import suppress

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
TURNS_WRITING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
SIGNS = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in TURNS_WRITING},
    **{code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)},
}


def visible(text: str) -> str:
    """Replace control and bidirectional override characters by visible signs; line breaks and tabs stay."""
    return text.translate(SIGNS)


class Screen:
    """Answers go to stdout, notes and errors too where a person sits at a terminal, else to stderr."""

    def __init__(self):
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._at_line_start = True

    def piece(self, text: str) -> None:
        """Print a piece of an answer, unbuffered."""
        self._at_line_start = text.endswith("\n")
        print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)

    def end_line(self) -> None:
        """Print a line break unless the cursor is at the start of a line."""
        if not self._at_line_start:
            print(flush=True)
        self._at_line_start = True

    def note(self, text: str) -> None:
        """Print a line about the conversation that is not part of it."""
        if self.interactive:
            print(f"{DIM}{visible(text)}{PLAIN}", flush=True)
        else:
            print(visible(text), file=sys.stderr, flush=True)

    def ask(self, prompt: str) -> str | None:
        """The next line of input; None at its end. Ctrl-C raises KeyboardInterrupt."""
        try:
            return input(prompt) if self.interactive else _line()
        except EOFError:
            return None


def prepare_input(interactive: bool) -> None:
    """Line editing and history on a terminal; bytes that are not UTF-8 are read as lone surrogates."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    if interactive:
        with suppress(ImportError):  # not on every system; then lines have no editing
            import readline  # input() uses it once it is imported

            readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one message


def _line() -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def is_text(line: str) -> bool:
    """Whether the line holds no lone surrogates, that is, no bytes that could not be decoded."""
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
