"""Choice of the chat template a conversion records: the requested one, the source's own, or the one known for it."""

from dataclasses import dataclass
from pathlib import Path

from ..architecture.families import AUTO
from ..tokenization.chat_templates import find_template, template_by_name, template_by_sizes, template_of_jinja
from ..utils.errors import ConfigError
from .sources import Source

NAMED, OWN, BY_NAME = "as asked", "the source's own", "from the name"
BY_SIZES = "from the sizes; --chat-template changes it"
NONE = "none: name one with --chat-template"
HUB_CACHE = "models--"  # begins the folder of a model in the hub client's cache: models--OWNER--NAME


@dataclass(frozen=True)
class Recorded:
    """name: of a template of ours, None for another or none; why: in words; jinja: what is written, None to leave the
    source's own."""

    name: str | None
    why: str
    jinja: str | None = None

    def __str__(self) -> str:
        return f"template {self.name}, {self.why}" if self.name else self.why


def choose_template(source: Source, asked_for: Path | str, option: str = AUTO) -> Recorded:
    """The template to record for an open source. asked_for: the folder, file or hub model a person named.

    option: a template's name, or "auto". Raises ConfigError for an unknown name, and where there is no tokenizer that
    could carry the one named; TokenizerError for a tokenizer that cannot be read.
    """
    from ..tokenization.convert import has_tokenizer, own_chat_template  # imports tokenizers

    if option != AUTO:
        template = find_template(option)
        if not has_tokenizer(source.path):
            raise ConfigError(
                f"The chat template {option} cannot be recorded: {source.path} holds no tokenizer files.\n"
                "Put the tokenizer's files beside the weights, or leave --chat-template out."
            )
        return Recorded(template.name, NAMED, template.jinja())
    if not has_tokenizer(source.path):
        return Recorded(None, "none: there are no tokenizer files")
    own = own_chat_template(source.path)
    if own:
        ours = template_of_jinja(own)
        return Recorded(ours.name if ours else None, OWN)
    return _known(source, asked_for)


def _known(source: Source, asked_for: Path | str) -> Recorded:
    for name in model_names(asked_for):
        known, template = template_by_name(name)
        if known:
            return Recorded(template.name, BY_NAME, template.jinja()) if template else Recorded(None, NONE)
    template = template_by_sizes(source.fields)
    return Recorded(template.name, BY_SIZES, template.jinja()) if template else Recorded(None, NONE)


def model_names(asked_for: Path | str) -> list[str]:
    """What a model may be called, by where it lies: its folder or file, a file's folder, one of the hub's cache."""
    place = Path(asked_for)
    real = place.resolve()
    cached = [part.rsplit("--", 1)[-1] for part in real.parts if part.startswith(HUB_CACHE)]
    names = [place.name, real.name, *([real.parent.name] if real.is_file() else []), *cached]
    return [name for name in dict.fromkeys(names) if name]
