"""Special token ids: the tokenizer knows them, config.json only repeats them and is sometimes wrong."""

from pathlib import Path

IDS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "pad_token_id"}


def tokenizer_ids(source: Path) -> dict[str, int]:
    """{"bos_token_id": 100006, ...} as the source folder's tokenizer has them; empty when it holds no readable one.

    A GGUF file needs no second opinion: its ids are the tokenizer's own metadata. Raises TokenizerError.
    """
    names = {path.name for path in source.iterdir()} if source.is_dir() else set()
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        return {}
    from .. import tokenizer_files  # imports the tokenizers library

    backend = tokenizer_files.load_backend(source)
    named = tokenizer_files.special_names(tokenizer_files.read_config(source), backend)
    found = {field: backend.token_to_id(named[name]) for name, field in IDS.items() if name in named}
    return {field: token for field, token in found.items() if token is not None}


def reconcile(fields: dict, ids: dict[str, int]) -> tuple[dict, list[str]]:
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
                warnings.append(f"{field}: config.json says {ours}, the tokenizer {theirs}; the tokenizer's is written")
            fields = {**fields, field: theirs}
        elif isinstance(ours, int) and not 0 <= ours < vocab:
            warnings.append(f"{field}: config.json says {ours}, which is no row of the embedding; null is written")
            fields = {**fields, field: None}
    return fields, warnings
