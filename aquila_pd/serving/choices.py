"""Choices of a response: token events of the engine's thread in, deltas of text and log-probabilities out.

A Choice turns the tokens of one sequence into pieces. A piece may carry several tokens: those of half a character, or
of what might have become a stop string, go out together with the text they prove to be.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..generation import TokenEvent, TokenLogprob
from ..generation.sequence import STOP
from ..text.text_stream import TextStream
from .vocabulary import Offsets


@dataclass
class Token:
    """A generated token in a response: its character offset in the answer, and its log-probability if requested."""

    id: int
    logprob: TokenLogprob | None
    offset: int


@dataclass
class Piece:
    """A delta of one choice: text, tokens, and the finish reason in the last one."""

    choice: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None

    def extend(self, later: "Piece") -> None:
        self.text += later.text
        self.tokens += later.tokens
        self.finish_reason = later.finish_reason

    @property
    def empty(self) -> bool:
        return not (self.text or self.tokens or self.finish_reason)


class Choice:
    """One of a request's n answers. offsets: None without log-probabilities; then no tokens are kept."""

    def __init__(self, number: int, text: TextStream, offsets: Offsets | None):
        self.number = number
        self.done = False
        self._text, self._offsets = text, offsets
        self._held: list[Token] = []
        self._given = 0  # characters

    def take(self, event: TokenEvent) -> Piece:
        """The delta of one token event. `done` is set when the answer has ended, also by a stop string."""
        text = ""
        if event.token is not None and event.token != event.sequence.stop_id:
            self._keep(event)
            text = self._text.push(event.token)
        if event.finish_reason is not None and self._text.stop_string is None:
            text += self._text.finish()
        reason = STOP if self._text.stop_string is not None else event.finish_reason
        self.done = reason is not None
        self._given += len(text)
        return Piece(self.number, text, self._ready(), reason)

    def _keep(self, event: TokenEvent) -> None:
        if self._offsets is not None:
            self._held.append(Token(event.token, event.logprob, self._offsets.push(event.token)))

    def _ready(self) -> list[Token]:
        """Those of the held tokens whose text has begun to go out; at the end all but those behind a stop string."""
        if self.done and self._text.stop_string is None:
            ready, self._held = self._held, []
            return ready
        count = sum(token.offset < self._given for token in self._held)
        ready, self._held = self._held[:count], self._held[count:]
        return ready


MakeChoice = Callable[[int], Choice]
