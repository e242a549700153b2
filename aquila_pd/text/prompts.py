"""Chat prompts: a chat template applied for one tokenizer, its stop ids and stop strings, truncation to a context."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from ..tokenization.chat_templates import Piece, find_template
from ..tokenizer import AquilaTokenizer
from ..utils.errors import ChatError, ConfigError

OWN = "the folder's own"  # the name of a template that is none of ours


class ChatPrompts:
    """A chat template bound to a tokenizer.

    template: a name, or None for the one that the tokenizer's folder records. eos_ids: ids that end an answer by the
    model's config files, besides the tokenizer's own. Raises ConfigError when there is no template, its name is not
    known, or it needs special tokens that the tokenizer has not.

    tokenizer: the one given. name: of the template. stop_ids: tokens that end an answer; stop_strings: texts that do,
    none of them such a token.
    """

    def __init__(self, tokenizer: AquilaTokenizer, template: str | None = None, *, eos_ids: Iterable[int] = ()):
        if template is None and tokenizer.chat_template is None:
            raise ConfigError(
                "The model's folder records no chat template. Name the one it was tuned with (--template NAME), or "
                "convert it with --chat-template NAME."
            )
        self.tokenizer = tokenizer
        self._template = tokenizer.template if template is None else find_template(template)
        if self._template:
            tokenizer.check_specials(self._template)
        self.name = self._template.name if self._template else OWN
        self.stop_strings, self.stop_ids = self._ends(eos_ids)

    def encode(self, messages: Sequence[Mapping]) -> list[int]:
        """Prompt ids of a conversation, with the generation prompt at their end. Raises ChatError."""
        return self.tokenizer.encode_pieces(self.pieces(messages))

    def pieces(self, messages: Sequence[Mapping], add_generation_prompt: bool = True) -> list[Piece]:
        """The rendered conversation in pieces, which say what is a training target. Raises ChatError."""
        if self._template:
            return self._template.render(messages, add_generation_prompt)
        return self.tokenizer.chat_pieces(messages, add_generation_prompt=add_generation_prompt)

    def fit(self, messages: Sequence[Mapping], max_tokens: int) -> tuple[list[Mapping], int]:
        """Truncate a conversation to a prompt of at most max_tokens tokens: messages kept, number of turns dropped.

        A turn is a user's message with the answers to it. The oldest go first, as few as it takes; the system message
        and the last turn stay. Raises ChatError when even these do not fit.
        """
        if len(self.encode(messages)) <= max_tokens:  # also: all messages can be written, the dropped ones too
            return list(messages), 0
        system, turns = in_turns(messages)
        least, most = 0, max(len(turns) - 1, 0)  # turns to drop; a prompt is the shorter the more go
        while least < most:
            middle = (least + most) // 2
            if len(self.encode([*system, *chain(*turns[middle:])])) <= max_tokens:
                most = middle
            else:
                least = middle + 1
        kept = [*system, *chain(*turns[most:])]
        tokens = len(self.encode(kept))
        if tokens > max_tokens:
            what = "The last message" + (" with the system message" if system else "")
            raise ChatError(
                f"{what} makes a prompt of {tokens:,} tokens, and at most {max_tokens:,} fit.\n"
                "Shorten it, or ask for a shorter answer, which leaves more room."
            )
        return kept, most

    def _ends(self, eos_ids: Iterable[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """(stop strings, stop ids). A stop string that is a special token becomes a stop id: it is never text."""
        tokenizer = self.tokenizer
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        eos = [tokenizer.eos_token_id] if tokenizer.eos_token is not None else []
        if self._template:
            ends = [*self._template.stop_strings, self._template.assistant.end]
            texts = tuple(text for text in self._template.stop_strings if text not in special)
        else:
            ends, texts = self._foreign_ends(), ()
        ids = [*eos, *eos_ids, *(special[text] for text in ends if text in special)]
        return texts, tuple(dict.fromkeys(ids))

    def _foreign_ends(self) -> list[str]:
        """What a Jinja template of the folder writes behind an answer; a stop id if it is a special token."""
        try:
            pieces = self.pieces(EXAMPLE, add_generation_prompt=False)
        except ChatError:  # it wants other conversations: the tokenizer's eos has to do
            return []
        return [piece.text for piece in pieces if piece.is_target and not piece.is_content]


EXAMPLE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def in_turns(messages: Sequence[Mapping]) -> tuple[list[Mapping], list[list[Mapping]]]:
    """(the system message, if there is one; turns), each turn from a user's message to before the next one."""
    system = [message for message in messages[:1] if message.get("role") == "system"]
    turns: list[list[Mapping]] = []
    for message in messages[len(system) :]:
        if not turns or message.get("role") == "user":
            turns.append([])
        turns[-1].append(message)
    return system, turns
