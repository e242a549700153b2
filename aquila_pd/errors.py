"""Named errors. A message says what was asked, what was found and what to do next, in full sentences."""


class AquilaError(Exception):
    """Base of every error that aquila_pd raises for something a person can mend."""


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


class GenerationError(AquilaError):
    """Generation cannot go on, for example because the logits are NaN or infinite."""


class InstallationError(AquilaError, ImportError):
    """An installed package is missing or of a version this project does not work with; also an ImportError."""


def report(headline: str, findings: list[str], advice: str) -> str:
    """One message out of many findings: a headline, one indented line each, and the next step."""
    return "\n".join([headline, *(f"  {line}" for line in findings), advice])
