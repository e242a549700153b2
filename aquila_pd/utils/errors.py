"""Named errors. A message says what was asked, what was found and what to do next, in full sentences.

What it repeats out of files may be hostile: it is cut, and what would steer a terminal is escaped.
"""

from collections.abc import Iterator
from contextlib import contextmanager

SHOWN = 200  # characters of a text, or of a value, that a message repeats
LINE = 2000  # characters of one line of a message
FINDINGS = 100  # lines of a report


def shown(text: str) -> str:
    """Text out of a file for use in a message: truncated, unprintable characters escaped."""
    cut = text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
    return printable(cut)


def shown_value(value: object) -> str:
    """A JSON value for use in a message: its repr, truncated."""
    return shown(repr(value))


def printable(line: str) -> str:
    """One line with unprintable characters escaped."""
    return line if line.isprintable() else repr(line)[1:-1]


class AquilaError(Exception):
    """Base of every error that aquila_pd raises for something the user can fix."""

    def __str__(self) -> str:
        lines = super().__str__().split("\n")
        return "\n".join(printable(line if len(line) <= LINE else f"{line[:LINE]}...") for line in lines)


class ConfigError(AquilaError):
    """A config.json (or an AquilaConfig) asks for something that does not exist or contradicts itself."""


class CheckpointError(AquilaError):
    """The files of a checkpoint are missing, damaged, or not the model its config describes."""


class OutputError(AquilaError):
    """The place to write to is taken, read-only, or has no room."""


class VerificationError(AquilaError):
    """A converted checkpoint does not hold what its source holds."""


class TokenizerError(AquilaError):
    """Text or tokenizer files cannot be used."""


class ChatError(AquilaError):
    """A conversation cannot be written as the chat template wants it, or does not fit."""


class GenerationError(AquilaError):
    """Generation cannot go on, for example because the logits are NaN or infinite."""


class DataError(AquilaError):
    """Rows to train on cannot be read, or hold nothing to train on."""


class RecipeError(AquilaError):
    """A training recipe asks for something that does not exist or contradicts itself."""


class TrainingError(AquilaError):
    """Training cannot go on, for example because the loss is NaN or a checkpoint is damaged."""


class InstallationError(AquilaError, ImportError):
    """An installed package is missing or of a version this project does not work with; also an ImportError."""


@contextmanager
def only_in_the_package(what: str) -> Iterator[None]:
    """Context of importing a module that the code bundled in a converted folder leaves out.

    There it raises InstallationError: `what` needs the package. Any other missing module is passed on.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("aquila_pd", __name__.split(".")[0]):
            raise
        raise InstallationError(f"{what} needs the package: pip install aquila_pd.", name="aquila_pd") from error


def report(headline: str, findings: list[str], advice: str) -> str:
    """One message for many findings: headline, one indented line each, next step."""
    listed = [f"  {shown(line) if len(line) > LINE else line}" for line in findings[:FINDINGS]]
    more = [f"  and {len(findings) - FINDINGS:,} more"] if len(findings) > FINDINGS else []
    return "\n".join([headline, *listed, *more, advice])
