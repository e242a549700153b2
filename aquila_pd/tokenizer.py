"""AquilaTokenizer: PaddleNLP's tokenizer interface on the `tokenizers` library.

Vocabulary, merges, pattern and special tokens come from files (tokenization/load.py says how). Encoding adds nothing
to a text unless its files say so; `encode` returns what PaddleNLP's does, a BatchEncoding. Plain texts go through
the library as one batch, in large amounts through tiktoken (tokenization/tiktoken.py), and into arrays without a Python
step per token; whatever else PaddleNLP's base class offers (pairs, strides, overflowing tokens, position ids ...) takes
the base class's way over the same backend.
"""

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from .runtime.base import (
    BatchEncoding,
    ChatTemplate,
    PaddingStrategy,
    PretrainedTokenizer,
    TruncationStrategy,
    to_py_obj,
)
from .tokenization.backend import is_byte_level
from .tokenization.chat_mixin import ChatMixin
from .tokenization.config import content_of, named_in, read_config, special_names
from .tokenization.load import open_backend, require_tokenizer
from .tokenization.save import write_files
from .tokenization.segments import PieceEncoder
from .utils.errors import InstallationError, TokenizerError, only_in_the_package
from .utils.files import write_text

SURROGATE = re.compile("[\ud800-\udfff]")
READ_HERE = ("added_tokens_file", "special_tokens_map_file")  # and not by PaddleNLP
SAVED_ATTRIBUTES = ("model_max_length", "padding_side", "truncation_side", "split_special_tokens")
CUTS_SINGLE_TEXTS = (TruncationStrategy.LONGEST_FIRST, TruncationStrategy.ONLY_FIRST)
# What _encode_texts answers; any other request takes the base class's way.
PLAIN_OPTIONS = frozenset(
    """
    add_special_tokens padding_strategy truncation_strategy max_length pad_to_multiple_of padding_side
    return_tensors return_attention_mask return_length return_dict verbose
    """.split()  # noqa: SIM905
)


class AquilaTokenizer(ChatMixin, PretrainedTokenizer):
    """Tokenizer of the Aquila family and of any folder or GGUF file with byte-level BPE or a SentencePiece model.

    vocab_file, merges_file, tokenizer_file, sentencepiece_file: the files of one folder; tokenizer_file
        (tokenizer.json) goes first, sentencepiece_file (tokenizer.model) last.
    tokenizer_object: a ready `tokenizers.Tokenizer` in place of files.
    pre_tokenizer: the splitting pattern by name, for a vocab.json whose folder does not say it.
    surrogates: what to do with text that holds lone surrogates (half of a UTF-16 pair, not encodable): "error"
        raises a TokenizerError that names the place, "replace" puts U+FFFD there. Also an attribute.

    Pads on the left unless told otherwise, as generation needs. decode leaves spaces alone unless
    clean_up_tokenization_spaces=True is passed; the setting of that name in tokenizer_config.json is not followed,
    because the published files say true and it damages text.
    """

    resource_files_names = {
        "vocab_file": "vocab.json",
        "merges_file": "merges.txt",
        "tokenizer_file": "tokenizer.json",
        "sentencepiece_file": "tokenizer.model",
    }
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        merges_file: str | None = None,
        *,
        tokenizer_file: str | None = None,
        sentencepiece_file: str | None = None,
        tokenizer_object: Tokenizer | None = None,
        pre_tokenizer: str | None = None,
        surrogates: str = "error",
        **kwargs: object,
    ) -> None:
        if surrogates not in ("error", "replace"):
            raise TokenizerError(f"surrogates={surrogates!r} is not known; use 'error' or 'replace'.")
        self.surrogates = surrogates
        self.sentencepiece_file = sentencepiece_file
        self.init_kwargs.pop("tokenizer_object", None)
        self.clean_up_tokenization_spaces = False
        config = dict(kwargs)
        if tokenizer_object is None:
            known = tokenizer_file or vocab_file or sentencepiece_file
            config = {**(read_config(Path(known).parent) if known else {}), **kwargs}
            config["pre_tokenizer"] = pre_tokenizer or config.get("pre_tokenizer")
            tokenizer_object = open_backend(vocab_file, merges_file, tokenizer_file, sentencepiece_file, config=config)
        self.backend = tokenizer_object
        for key, token in special_names(config, self.backend).items():
            if getattr(self, f"_{key}") is None:
                setattr(self, key, token)
        self._note_added_tokens()
        named = set(self.all_special_tokens)
        self._additional_special_tokens = [
            *self._additional_special_tokens,
            *(t.content for t in self.added_tokens_decoder.values() if t.special and t.content not in named),
        ]
        self._prefix, self._suffix = self._ids_around_a_text()
        if config.get("chat_template"):
            self.init_chat_template(config["chat_template"])

    def _note_added_tokens(self) -> None:
        """Update PaddleNLP's tables of added tokens from the backend, which is authoritative."""
        self.added_tokens_decoder = dict(sorted(self.backend.get_added_tokens_decoder().items()))
        self.added_tokens_encoder = {token.content: i for i, token in self.added_tokens_decoder.items()}
        self._pieces = PieceEncoder(self.backend)
        fast_ids = fast_ids_class()
        self.fast_ids = fast_ids and fast_ids(self.backend)
        # A byte-level decoder takes letters such as é in an added token for bytes; these are decoded one by one.
        letters = self.added_tokens_decoder if is_byte_level(self.backend) else ()
        decoded = {i: self.backend.decode([i], skip_special_tokens=False) for i in letters}
        self._decode_alone = {i for i, text in decoded.items() if text != self.added_tokens_decoder[i].content}

    def _ids_around_a_text(self) -> tuple[list[int], list[int]]:
        """What the backend puts before and after a text (nothing for Aquila), found by encoding one."""
        full, inner = self.backend.encode("a"), self.backend.encode("a", add_special_tokens=False)
        if full.ids == inner.ids:
            return [], []
        before = next((i for i, is_special in enumerate(full.special_tokens_mask) if not is_special), len(full.ids))
        return full.ids[:before], full.ids[before + len(inner.ids) :]

    # ---------------------------------------------------------------------------------------------- loading, saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: object, **kwargs: object) -> "AquilaTokenizer":
        """The tokenizer of a folder (or of a .gguf file, or of a name PaddleNLP can fetch).

        Raises TokenizerError when the folder holds no tokenizer that can be read.
        """
        path = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if path.suffix == ".gguf" and path.is_file():
            with only_in_the_package("The tokenizer of a GGUF file"):
                from .tokenization.gguf import from_gguf
            backend, config = from_gguf(path)
            return cls(tokenizer_object=backend, **{**config, **kwargs})
        if path.is_dir():
            require_tokenizer(path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _from_pretrained(
        cls, resolved_vocab_files: dict, pretrained_model_name_or_path: str, *args: object, **kwargs: object
    ) -> object:
        # The base class would add the tokens of added_tokens.json behind those the backend already holds, and set
        # names that are written as objects without reading their content: both files are read by read_config.
        files = {key: file for key, file in resolved_vocab_files.items() if key not in READ_HERE}
        folder = next((Path(file).parent for file in files.values() if file), None)
        config = read_config(folder) if folder else {}
        for key, token in named_in(config).items():
            kwargs.setdefault(key, token)
        if config.get("additional_special_tokens"):
            kwargs.setdefault("additional_special_tokens", list(map(content_of, config["additional_special_tokens"])))
        return super()._from_pretrained(files, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str, filename_prefix: str | None = None, **kwargs: object
    ) -> tuple[str, ...]:
        """Write all tokenizer files to a folder; returns their paths. Loading them gives the same tokenizer."""
        config = {key: value for key, value in self.init_kwargs.items() if is_plain(value) and key[0] != "_"}
        config.update({key: getattr(self, key) for key in SAVED_ATTRIBUTES})
        config.update({key: value for key, value in self.special_tokens_map.items() if isinstance(value, str)})
        config["surrogates"] = self.surrogates
        folder, prefix = Path(save_directory), f"{filename_prefix}-" if filename_prefix else ""
        model = Path(self.sentencepiece_file) if self.sentencepiece_file else None
        names = write_files(self.backend, config, output=folder, prefix=prefix, sentencepiece=model)
        if isinstance(self.chat_template, ChatTemplate):
            template = json.dumps(asdict(self.chat_template), ensure_ascii=False)
            write_text(folder / "chat_template.json", template)
            names.append("chat_template.json")
        return tuple(str(folder / name) for name in names)

    # ------------------------------------------------------------------------------------------------- vocabulary

    @property
    def vocab_size(self) -> int:
        """The number of BPE tokens; len(tokenizer) counts the added tokens too."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    def _add_tokens(self, new_tokens: Iterable[str | AddedToken], special_tokens: bool = False) -> int:
        """Add tokens; returns by how many the vocabulary grew (a token it already holds only becomes indivisible)."""
        before = len(self)
        add = self.backend.add_special_tokens if special_tokens else self.backend.add_tokens
        add(list(new_tokens))
        self._note_added_tokens()
        return len(self) - before

    def _convert_token_to_id_with_added_voc(self, token: str | None) -> int | None:
        if token is None:
            return None
        found = self.backend.token_to_id(str(token))
        if found is None and self._unk_token is not None:
            found = self.backend.token_to_id(str(self._unk_token))
        return found

    _convert_token_to_id = _convert_token_to_id_with_added_voc

    def _convert_id_to_token(self, index: int) -> str | None:
        return self.backend.id_to_token(index)

    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str | list[str]:
        """The token of one id, or the tokens of several; None for an id the vocabulary does not hold."""
        ids = to_py_obj(ids)
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        skip = {i for i, token in self.added_tokens_decoder.items() if token.special} if skip_special_tokens else ()
        return [self._convert_id_to_token(i) for i in ids if i not in skip]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.backend.decoder.decode(tokens)

    # --------------------------------------------------------------------------------------------------- encoding

    def _encodings(
        self, texts: list[str], *, ids_only: bool = False, backend: Tokenizer | None = None
    ) -> list[Encoding]:
        """The encodings of several texts, without the ids around a text.

        ids_only: the library's faster way, which leaves tokens and offsets empty. backend: to encode with, by default
        the one that finds special tokens, or with split_special_tokens the one that does not.
        """
        backend = backend or self._backend_for(self.split_special_tokens)
        encode = backend.encode_batch_fast if ids_only else backend.encode_batch
        try:
            return encode(texts, add_special_tokens=False)
        except TypeError:
            return encode(self._without_surrogates(texts), add_special_tokens=False)

    def _backend_for(self, split_special_tokens: bool) -> Tokenizer:
        return self._pieces.for_words() if split_special_tokens else self.backend

    def _without_surrogates(self, texts: list[str]) -> list[str]:
        """The texts with U+FFFD for lone surrogates (pairs become the character they stand for), or an error."""
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise TokenizerError(f"Text {number} of the batch is a {type(text).__name__}; only str can be encoded.")
            found = SURROGATE.search(text)
            if found and self.surrogates == "error":
                raise TokenizerError(
                    f"Text {number} of the batch holds the surrogate U+{ord(found[0]):04X} at position "
                    f"{found.start()}: half of a UTF-16 pair, not a character.\nRead the text with the right encoding, "
                    'or pass surrogates="replace" to AquilaTokenizer to put U+FFFD in its place.'
                )
        return [text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts]

    def tokenize(self, text: str, **kwargs: object) -> list[str]:
        """The tokens of one text, in the vocabulary's spelling (bytes shown as letters, a space as Ġ)."""
        backend = self._backend_for(kwargs.get("split_special_tokens", self.split_special_tokens))
        return self._encodings([text], backend=backend)[0].tokens

    def get_offset_mapping(self, text: str, split_tokens: list[str] | None = None) -> list[tuple[int, int]] | None:
        """(start, end) of each token in characters of the text; tokens of one character share its place."""
        return None if text is None else self._encodings([text])[0].offsets

    def build_inputs_with_special_tokens(self, token_ids_0: list, token_ids_1: list | None = None) -> list[int]:
        return wrapped([token_ids_0, token_ids_1], self._prefix, self._suffix)

    def build_offset_mapping_with_special_tokens(self, offset_mapping_0: list, offset_mapping_1: list | None = None):
        before, after = [(0, 0)] * len(self._prefix), [(0, 0)] * len(self._suffix)
        return wrapped([offset_mapping_0, offset_mapping_1], before, after)

    def create_token_type_ids_from_sequences(self, token_ids_0: list, token_ids_1: list | None = None) -> list[int]:
        around = len(self._prefix) + len(self._suffix)
        second = 0 if token_ids_1 is None else len(token_ids_1) + around
        return [0] * (len(token_ids_0) + around) + [1] * second

    def get_special_tokens_mask(
        self, token_ids_0: list, token_ids_1: list | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 where a token is special, 0 where it is text."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        texts = [ids and [0] * len(ids) for ids in (token_ids_0, token_ids_1)]
        return wrapped(texts, [1] * len(self._prefix), [1] * len(self._suffix))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return (len(self._prefix) + len(self._suffix)) * (2 if pair else 1)

    def _batch_encode_plus(self, batch_text_or_text_pairs: list, **options: object) -> BatchEncoding:
        texts = batch_text_or_text_pairs
        if self._is_plain(options) and all(type(text) is str for text in texts):
            return self._encode_texts(list(texts), options)
        return super()._batch_encode_plus(batch_text_or_text_pairs=texts, **options)

    def _encode_plus(self, text: str, text_pair: str | None = None, **options: object) -> BatchEncoding:
        # The base class counts padding in the length of a single text and not in a batch: its own way, then.
        plain = type(text) is str and text_pair is None and not options.get("return_length")
        if not plain or not self._is_plain(options):
            return super()._encode_plus(text=text, text_pair=text_pair, **options)
        encoded = self._encode_texts([text], options)
        if options.get("return_tensors") is None:
            return BatchEncoding({key: value[0] for key, value in encoded.items()})
        return encoded

    def _is_plain(self, options: dict) -> bool:
        """Whether no option is set that only the base class supports."""
        rare = any(value and key not in PLAIN_OPTIONS for key, value in options.items())
        side_known = options.get("padding_side") in (None, "left", "right")
        inputs_known = set(self.model_input_names) <= {"input_ids", "attention_mask"}
        return not rare and side_known and inputs_known and options.get("return_dict", True)

    def _encode_texts(self, texts: list[str], options: dict) -> BatchEncoding:
        """Plain texts -> BatchEncoding of lists, or of [texts, width] int64 tensors when return_tensors is set."""
        rows = self._ids_of(texts)
        max_length = options.get("max_length")
        around = self.num_special_tokens_to_add() if options.get("add_special_tokens", True) else 0
        if max_length and options.get("truncation_strategy") in CUTS_SINGLE_TEXTS:
            rows = self._truncate(rows, max(max_length - around, 0))
        if around:
            rows = [self.build_inputs_with_special_tokens(row) for row in as_lists(rows)]
        longest = max(rows, key=len, default=[])
        self._eventual_warn_about_too_long_sequence(longest, max_length, options.get("verbose", True))

        width = padded_width(rows, max_length, options)
        with_mask = options.get("return_attention_mask")
        with_mask = "attention_mask" in self.model_input_names if with_mask is None else with_mask
        side = options.get("padding_side") or self.padding_side
        tensors = options.get("return_tensors")
        lengths = [len(row) for row in rows]
        if tensors is not None and (width is not None or len(set(lengths)) < 2):
            data = self._to_arrays(rows, lengths, max([width or 0, *lengths]), side)
        else:
            data = self._to_lists(rows, width or 0, side)
        if not with_mask:
            del data["attention_mask"]
        if options.get("return_length"):
            data["length"], data["seq_len"] = lengths, list(lengths)
        return BatchEncoding(data, tensor_type=tensors)

    def _ids_of(self, texts: list[str]) -> list[list[int]] | list[np.ndarray]:
        """The ids of each text, without those around it: int64 arrays where tiktoken made them, else lists."""
        rows = self.fast_ids.rows(texts) if self.fast_ids and not self.split_special_tokens else None
        return [encoding.ids for encoding in self._encodings(texts, ids_only=True)] if rows is None else rows

    def _truncate(self, rows: list, limit: int) -> list:
        if self.truncation_side == "left":
            return [row[max(len(row) - limit, 0) :] for row in rows]
        return [row[:limit] for row in rows]

    def _to_lists(self, rows: list, width: int, side: str) -> dict[str, list[list[int]]]:
        rows = as_lists(rows)
        pads = [max(width - len(row), 0) for row in rows]
        pad = self.pad_token_id if any(pads) else 0

        def join(padding: list[int], row: list[int]) -> list[int]:
            return padding + row if side == "left" else row + padding

        return {
            "input_ids": [join([pad] * n, row) for n, row in zip(pads, rows, strict=True)],
            "attention_mask": [join([0] * n, [1] * len(row)) for n, row in zip(pads, rows, strict=True)],
        }

    def _to_arrays(self, rows: list, lengths: list[int], width: int, side: str) -> dict[str, np.ndarray]:
        """Rows of different lengths -> ids and mask, both int64 [rows, width]."""
        count = np.array(lengths, dtype=np.int64)[:, None]  # [B, 1]
        place = np.arange(width)
        keep = place >= width - count if side == "left" else place < count  # [B, width]
        ids = np.full(keep.shape, 0 if keep.all() else self.pad_token_id, dtype=np.int64)
        if rows and isinstance(rows[0], np.ndarray):
            ids[keep] = np.concatenate(rows)
        else:
            ids[keep] = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=sum(lengths))
        return {"input_ids": ids, "attention_mask": keep.astype(np.int64)}

    # --------------------------------------------------------------------------------------------------- decoding

    def decode(
        self,
        token_ids: object,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        **kwargs: object,
    ) -> str:
        """The text of some ids: an int, a list, an array or a Paddle tensor [T]; ids beyond the vocabulary are skipped.

        skip_special_tokens: leave special tokens out. clean_up_tokenization_spaces: remove spaces before
        punctuation and English contractions, as older libraries do by default.
        """
        return super().decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)

    def batch_decode(
        self,
        sequences: object,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        **kwargs: object,
    ) -> list[str]:
        """The text of each row of ids: lists, an array or a Paddle tensor [B, T]. See `decode`."""
        rows = [row if isinstance(row, list) else [row] for row in to_py_obj(sequences)]
        if self._decode_alone or kwargs:
            texts = [self._decode(row, skip_special_tokens, **kwargs) for row in rows]
        else:
            texts = call_with_ids(self.backend.decode_batch, rows, skip_special_tokens)
        return list(map(self.clean_up_tokenization, texts)) if clean_up_tokenization_spaces else texts

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        spaces_between_special_tokens: bool = False,
        **kwargs: object,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if spaces_between_special_tokens or not self._decode_alone.isdisjoint(ids):
            pieces = self._decode_pieces(ids, skip_special_tokens)
            text = (" " if spaces_between_special_tokens else "").join(pieces)
        else:
            text = call_with_ids(self.backend.decode, ids, skip_special_tokens)
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def _decode_pieces(self, ids: list[int], skip_special_tokens: bool) -> list[str]:
        """Added tokens as they are written, and the text of each run of other tokens between them."""
        pieces = []
        for is_added, run in itertools.groupby(ids, self.added_tokens_decoder.__contains__):
            if is_added:
                tokens = map(self.added_tokens_decoder.__getitem__, run)
                pieces += [token.content for token in tokens if not (skip_special_tokens and token.special)]
            else:
                pieces.append(call_with_ids(self.backend.decode, list(run), skip_special_tokens))
        return pieces


@cache
def fast_ids_class() -> type | None:
    """tiktoken's FastIds; None in a converted folder's copy of the code, where the library encodes everything."""
    try:
        with only_in_the_package("Encoding by tiktoken"):
            from .tokenization.tiktoken import FastIds
    except InstallationError:
        return None
    return FastIds


def as_lists(rows: list) -> list[list[int]]:
    """Rows that may be arrays, as lists of Python's int."""
    return [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]


def padded_width(rows: list, max_length: int | None, options: dict) -> int | None:
    """The length every row is padded to, or None when nothing is padded."""
    strategy = options.get("padding_strategy", PaddingStrategy.DO_NOT_PAD)
    if strategy == PaddingStrategy.DO_NOT_PAD:
        return None
    width = max(map(len, rows), default=0) if strategy == PaddingStrategy.LONGEST else max_length
    multiple = options.get("pad_to_multiple_of") or 1
    return -(-width // multiple) * multiple


def call_with_ids(decode, ids: list, skip_special_tokens: bool):
    """decode(ids) of the backend, with an error a person can read for ids that cannot be ids."""
    try:
        return decode(ids, skip_special_tokens=skip_special_tokens)
    except (OverflowError, TypeError) as error:
        raise TokenizerError(
            f"Only whole numbers from 0 can be decoded ({error}).\n"
            "Labels hold -100 where nothing is predicted: replace those by the pad id first."
        ) from error


def wrapped(parts: list[list | None], before: list, after: list) -> list:
    """The parts that are there, one after the other, each with `before` and `after` around it."""
    return [item for part in parts if part is not None for item in (*before, *part, *after)]


def is_plain(value: object) -> bool:
    """Whether JSON can hold the value."""
    try:
        return bool(json.dumps(value))
    except (TypeError, ValueError):
        return False
