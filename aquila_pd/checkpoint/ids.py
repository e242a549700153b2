"""Special token ids: the tokenizer's override those of config.json and generation_config.json, with a warning."""

from pathlib import Path

from ..utils.errors import CheckpointError, report
from ..utils.files import shown_value
from .layout import CONFIG

GENERATION_CONFIG = "generation_config.json"
IDS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "pad_token_id"}


def tokenizer_ids(source: Path) -> dict[str, int]:
    """Special ids of a folder's tokenizer, {"bos_token_id": 100006, ...}; empty without a readable one.

    A GGUF file needs no second opinion: its ids are the tokenizer's own metadata. Raises TokenizerError.
    """
    names = {path.name for path in source.iterdir()} if source.is_dir() else set()
    if not {"tokenizer.json", "tokenizer.model"} & names and not {"vocab.json", "merges.txt"} <= names:
        return {}
    from ..tokenization import convert  # imports the tokenizers library

    backend = convert.load_backend(source)
    named = convert.special_names(convert.read_config(source), backend)
    found = {field: backend.token_to_id(named[name]) for name, field in IDS.items() if name in named}
    return {field: token for field, token in found.items() if token is not None}


def check_vocabulary(tokenizer: Path, vocab: int) -> None:
    """Raise CheckpointError when tokenizer.json has ids beyond the rows of the embedding."""
    from ..tokenization import convert  # imports the tokenizers library

    backend = convert.load_tokenizer_json(tokenizer / convert.TOKENIZER_JSON)
    token, highest = max(backend.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1], default=("", -1))
    if highest >= vocab:
        raise CheckpointError(
            f"The tokenizer makes ids up to {highest} ({token!r}), but the model has {vocab} rows (vocab_size), so the "
            f"highest id may be {vocab - 1}.\nNothing was written. The tokenizer and the weights come from different "
            "models; fetch both from one place."
        )


def reconcile(fields: dict, ids: dict[str, int], *, said_by: str = CONFIG) -> tuple[dict, list[str]]:
    """The fields with the tokenizer's ids where they differ, and one warning for each change."""
    warnings = []
    vocab = fields["vocab_size"]
    for field in IDS.values():
        ours, theirs = fields[field], ids.get(field)
        if theirs is not None and theirs >= vocab:
            warnings.append(f"{field}: the tokenizer says {theirs}, but the model has {vocab} rows; it is not used")
            theirs = None
        if theirs is not None and theirs != ours and not (isinstance(ours, list) and theirs in ours):
            if ours is not None:
                warnings.append(f"{field}: {said_by} says {ours}, the tokenizer {theirs}; the tokenizer's is written")
            fields = {**fields, field: theirs}
        elif ours is not None and not all(0 <= token < vocab for token in (ours if isinstance(ours, list) else [ours])):
            warnings.append(f"{field}: {said_by} says {ours}, which is no row of the embedding; null is written")
            fields = {**fields, field: None}
    return fields, warnings


def generation_ids(fields: dict, generation: dict, ids: dict[str, int]) -> tuple[dict, list[str]]:
    """The ids of generation_config.json: the tokenizer's, else the source's generation config's, else the fields'.

    fields: vocab_size and the ids of config.json, reconciled. Raises CheckpointError for ids that cannot be.
    """
    said = {field: generation[field] for field in IDS.values() if generation.get(field) is not None}
    _check_said(said, fields["vocab_size"])
    found, warnings = reconcile({**fields, **said}, ids, said_by=GENERATION_CONFIG)
    for field, value in said.items():
        other = fields[field]
        if found[field] == value != other and not (isinstance(value, list) and other in value) and field not in ids:
            warnings.append(
                f"{field}: {CONFIG} says {other}, {GENERATION_CONFIG} {value}; each file is written as it was"
            )
    return {field: found[field] for field in IDS.values()}, warnings


def _check_said(said: dict, vocab: int) -> None:
    findings = []
    for field, value in said.items():
        values = value if isinstance(value, list) and field == "eos_token_id" else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in values) or not values:
            findings.append(f"{field} is {shown_value(value)}, not a token id")
        elif isinstance(value, list) and not all(0 <= token < vocab for token in values):
            outside = [token for token in values if not 0 <= token < vocab]
            findings.append(f"{field} lists {shown_value(outside)}, but the model has {vocab} rows, 0 to {vocab - 1}")
    if findings:
        advice = "Nothing was written. Mend the file in a copy of the source, or fetch it again."
        raise CheckpointError(report(f"{GENERATION_CONFIG} names tokens that cannot be:", findings, advice))
