"""Chat mixin of AquilaTokenizer: chat templates, conversations rendered to pieces and encoded.

How templates look is in chat_templates.py, how pieces become ids in segments.py. A folder's Jinja text that is
none of ours is used as it is: rendering it with placeholders tells contents from scaffolding. Headers that
are plain text are not known there, and so not broken where contents hold them.
"""

import itertools
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from tokenizers import Tokenizer

from ..runtime.base import ChatTemplate, logger
from ..utils.errors import ChatError, ConfigError, TokenizerError, report, shown, shown_value
from .chat_templates import TEMPLATES, Piece, Template, template_of_jinja
from .config import CHAT_TEMPLATE_JSON, read_chat_template_json
from .segments import Encoded, PieceEncoder, Span

# What apply_chat_template passes on to PaddleNLP's padding, truncation and making of tensors.
PASSED_ON = (
    "padding",
    "truncation",
    "max_length",
    "pad_to_multiple_of",
    "padding_side",
    "return_tensors",
    "return_attention_mask",
    "return_position_ids",
    "return_length",
    "verbose",
)
OF_A_TEMPLATE = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError)  # what rendering may raise
PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")  # of surrogates: one character to an encoder
ROLE = re.compile(r"\w+")  # templates write roles into their headers


class ChatMixin:
    """The chat part of AquilaTokenizer; the rest provides the backend, _encodings and PaddleNLP's interface."""

    _jinja: str | None = None  # the Jinja text in use
    _pieces: PieceEncoder

    # ------------------------------------------------------------------------------------------------ the template

    def init_chat_template(self, chat_template: str | dict | list | ChatTemplate) -> None:
        """Set the chat template; a Jinja text is kept word for word for saving.

        Of a list of named templates, as Hugging Face writes it, the one called "default" is used and all are kept.
        """
        is_file = isinstance(chat_template, str) and Path(chat_template[:200]).exists()
        if is_file and Path(chat_template).name == CHAT_TEMPLATE_JSON:
            chat_template, is_file = read_chat_template_json(Path(chat_template)), False
        if isinstance(chat_template, str | list) and not is_file:
            self.init_kwargs["chat_template"] = chat_template
        if isinstance(chat_template, list):
            chat_template = {t["name"]: t["template"] for t in chat_template}.get("default")
            if chat_template is None:
                return
        self._jinja = chat_template if isinstance(chat_template, str) and not is_file else None
        try:
            super().init_chat_template(chat_template)
        except TemplateSyntaxError as error:
            logger.warning(f"The chat template uses Jinja that PaddleNLP does not know; kept, but not usable: {error}")

    def __getstate__(self) -> dict:
        """For pickle and deepcopy: compiled Jinja templates cannot travel, their text in init_kwargs does."""
        state = {key: value for key, value in self.__dict__.items() if key not in ("init_config", "_pieces")}
        if not isinstance(state.get("chat_template"), ChatTemplate):
            state.pop("chat_template", None)
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._pieces = PieceEncoder(self.backend)
        if self.chat_template is None and self.init_kwargs.get("chat_template"):
            self.init_chat_template(self.init_kwargs["chat_template"])

    @property
    def template(self) -> Template | None:
        """The template of ours whose Jinja text is in use; None for any other, and for none."""
        return template_of_jinja(self._jinja)

    def check_specials(self, template: Template) -> None:
        """Raise ConfigError when the template's scaffolding needs tokens that this vocabulary has not."""
        missing = [token for token in template.specials if token not in self.added_tokens_encoder]
        if missing:
            raise ConfigError(
                f"The chat template {template.name} needs special tokens that this tokenizer has not: "
                f"{', '.join(missing)}.\nName the template the model was tuned with; known: {', '.join(TEMPLATES)}."
            )

    # ---------------------------------------------------------------------------------------------- conversations

    def apply_chat_template(
        self,
        conversation: str | Sequence,
        tokenize: bool = True,
        context_data: Mapping | None = None,
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = True,
        return_dict: bool = True,
        **options: object,
    ) -> object:
        """A conversation as the model was tuned to read it: text, or with tokenize a BatchEncoding of its ids.

        conversation: [{"role", "content"}, ...]; or PaddleNLP's forms, a user's text and [[user, bot], ..., [user]].
        context_data: for PaddleNLP's ChatTemplate objects. add_special_tokens: false leaves out the ids that the
        tokenizer puts before every text. return_dict: false gives the ids alone. options: those of PASSED_ON.
        Raises ChatError for what cannot be written, ConfigError where the template is missing or needs other tokens.
        """
        unknown = sorted(set(options) - set(PASSED_ON))
        if unknown:
            raise TypeError(f"apply_chat_template() does not know {', '.join(unknown)}; known: {', '.join(PASSED_ON)}")
        pieces = self.chat_pieces(conversation, add_generation_prompt=add_generation_prompt, context_data=context_data)
        if not tokenize:
            return "".join(piece.text for piece in pieces)
        if self.template:
            self.check_specials(self.template)
        ids = self.encode_pieces(pieces, add_special_tokens=add_special_tokens)
        in_tensors = options.get("return_tensors") is not None
        inputs = self.prepare_for_model(ids, add_special_tokens=False, prepend_batch_axis=in_tensors, **options)
        return inputs if return_dict else inputs["input_ids"]

    def encode_pieces(self, pieces: Sequence[Piece], *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text in pieces, special tokens found only where a piece is no content.

        add_special_tokens: those that the tokenizer puts before every text come first, unless the text brings them.
        Raises TokenizerError where words cannot be kept from becoming a special token (see tokenization/segments.py).
        """
        return self._with_prefix(self._pieces.encoded(pieces, self._encode_with), add_special_tokens).ids

    def encode_pieces_with_spans(self, pieces: Sequence[Piece], *, add_special_tokens: bool = True) -> Encoded:
        """The same ids, each with the stretch of the pieces' text that it writes a part of: (begin, end) in characters.

        The ids that the tokenizer puts in front of every text write nothing of it, (0, 0).
        """
        return self._with_prefix(self._pieces.encoded(pieces, self._encode_with_spans), add_special_tokens)

    def _with_prefix(self, encoded: Encoded, wanted: bool) -> Encoded:
        before = self._prefix if wanted else []
        if encoded.ids[: len(before)] == before:
            return encoded
        return Encoded([*before, *encoded.ids], [*[(0, 0)] * len(before), *encoded.spans])

    def _encode_with(self, backend: Tokenizer, text: str) -> Encoded:
        return Encoded(self._encodings([text], ids_only=True, backend=backend)[0].ids, [])

    def _encode_with_spans(self, backend: Tokenizer, text: str) -> Encoded:
        found = self.fast_ids.encoded(text) if self.fast_ids and backend is self.backend else None
        if found is not None:
            return found
        backend = self._pieces.without_trimming() if backend is self.backend else backend
        (encoding,) = self._encodings([text], backend=backend)
        return Encoded(encoding.ids, in_pairs(encoding.offsets, text))

    def chat_pieces(
        self, conversation: str | Sequence, *, add_generation_prompt: bool = True, context_data: Mapping | None = None
    ) -> list[Piece]:
        """A conversation in pieces, written with the chat template in use; see apply_chat_template.

        With a template that is none of ours, targets are the answers and a special token right behind each.
        """
        if isinstance(self.chat_template, str):  # set as an attribute, the way of transformers
            self.init_chat_template(self.chat_template)
        if self.chat_template is None:
            raise ConfigError(
                "The tokenizer has no chat template that can be used.\nConvert the model with --chat-template NAME, or "
                "hand one to init_chat_template()."
            )
        messages = as_messages(conversation)
        if self.template:
            return self.template.render(messages, add_generation_prompt)
        self._check_foreign(messages)
        if isinstance(self.chat_template, ChatTemplate):
            write = self._rounds_writer([message["role"] for message in messages], dict(context_data or {}))
        else:
            write = partial(self._write_jinja, messages, add_generation_prompt)
        return self._split(refusing(write), messages)

    def _write_jinja(self, messages: list[Mapping], add_generation_prompt: bool, contents: list[str]) -> str:
        said = [{**message, "content": text} for message, text in zip(messages, contents, strict=True)]
        names = self.special_tokens_map
        return self.chat_template.render(messages=said, **names, add_generation_prompt=add_generation_prompt)

    def _rounds_writer(self, roles: list[str], context: dict) -> Callable[[list[str]], str]:
        """Contents written by PaddleNLP's ChatTemplate, which takes rounds of user and bot."""
        if roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
            raise ChatError(
                f"This chat template is PaddleNLP's own, for rounds of user and assistant; the roles are {roles}.\n"
                "Begin with the user, and let the two take turns."
            )

        def write(contents: list[str]) -> str:
            rounds = [contents[i : i + 2] for i in range(0, len(contents), 2)]
            return self._apply_chat_template_paddle(rounds, dict(context))  # which writes into the context

        return write

    def _check_foreign(self, messages: list[Mapping]) -> None:
        """Raise ChatError for messages that no template should see, and for hidden special tokens beside contents."""
        findings = []
        for number, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or not ROLE.fullmatch(role):
                findings.append(f"message {number} has the role {shown_value(role)}")
            if not isinstance(content, str):
                findings.append(f"message {number} has the content {shown_value(content)}, not text")
            findings += [
                f"message {number} has the special token {mark.token} in its {shown(str(key))}"
                for key, value in message.items()
                for mark in ([] if key in ("role", "content") else self._pieces.marks(str(value)))
            ]
        if findings:
            advice = 'A message is {"role": ..., "content": text}, its role a word.'
            raise ChatError(report("The conversation cannot be written:", findings, advice))

    def _split(self, write: Callable[[list[str]], str], messages: list[Mapping]) -> list[Piece]:
        """What `write` makes of the messages' contents, in pieces."""
        contents = [message["content"] for message in messages]
        text = write(contents)
        names = stand_ins(len(contents), absent_from="\n".join([text, self._jinja or "", *contents]))
        parts = re.split(f"({'|'.join(names)})", write(names))
        for written in (contents, [content.strip() for content in contents]):
            words = dict(zip(names, written, strict=True))
            if "".join(words.get(part, part) for part in parts) == text:
                answers = {name for name, m in zip(names, messages, strict=True) if m["role"] == "assistant"}
                return self._as_pieces(parts, words, answers)
        # The template does more with contents than to strip them. Where they stand is not known, and need not be when
        # they hold nothing that could become a special token.
        found = sorted({mark.token for content in contents for mark in self._pieces.marks(content)})
        if found:
            raise TokenizerError(
                f"The messages hold the text of special tokens, {', '.join(found)}, and this chat template changes "
                "what it is given,\nso that they cannot be told from its own. Take them out of the messages."
            )
        return [Piece(text, False, False)]

    def _as_pieces(self, parts: list[str], words: Mapping[str, str], answers: set[str]) -> list[Piece]:
        pieces = []
        for before, part in itertools.pairwise(["", *parts]):
            if part in words:
                pieces.append(Piece(words[part], part in answers, True))
                continue
            mark = next(iter(self._pieces.marks(part)), None) if before in answers else None
            end = len(mark.token) if mark and part.startswith(mark.token) else 0
            pieces += [Piece(part[:end], True, False), Piece(part[end:], False, False)]
        return [piece for piece in pieces if piece.text or piece.is_content]


def in_pairs(spans: list[Span], text: str) -> list[Span]:
    """Spans in a text whose surrogate pairs are one character each, as spans in the text itself."""
    pairs = [found.start() - number for number, found in enumerate(PAIR.finditer(text))]
    return [(b + bisect_left(pairs, b), e + bisect_left(pairs, e)) for b, e in spans] if pairs else spans


def refusing(write: Callable[[list[str]], str]) -> Callable[[list[str]], str]:
    """`write`, whose template's errors become a ChatError."""

    def written(contents: list[str]) -> str:
        try:
            return write(contents)
        except OF_A_TEMPLATE as error:
            raise ChatError(f"The chat template cannot write this conversation: {error}") from error

    return written


def as_messages(conversation: str | Sequence) -> list[Mapping]:
    """A conversation in any form as messages: messages, a user's text, or rounds [[user, bot], ..., [user]]."""
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    turns = list(conversation) if isinstance(conversation, Sequence) else []
    if turns and all(isinstance(turn, Mapping) for turn in turns):
        return turns
    if turns and all(isinstance(turn, list | tuple) and 1 <= len(turn) <= 2 for turn in turns):
        said = [pair for turn in turns for pair in zip(("user", "assistant"), turn, strict=False)]
        return [{"role": role, "content": content} for role, content in said if content is not None]
    raise ChatError(
        f"A conversation cannot be {shown_value(conversation)}.\n"
        'Give one at a time: [{"role": "user", "content": "..."}, ...], [[user, bot], ..., [user]], or a text.'
    )


def stand_ins(count: int, *, absent_from: str) -> list[str]:
    """Words of letters and digits that a text does not hold, none of them within another."""
    stem = next(stem for stem in (f"q{i}x" for i in itertools.count()) if stem not in absent_from)
    return [f"{stem}{i}z" for i in range(count)]
