"""An answer on its way from the engine to its client: tokens in, in the engine's thread; pieces of text out.

A Choice makes pieces of one sequence's tokens. A piece may carry several tokens: those of half a character, or of what
might have become a stop string, go out together with the text that they turn out to be.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..generation import TokenEvent, TokenLogprob
from ..text.text_stream import TextStream
from .vocabulary import Offsets

LENGTH, STOP = "length", "stop"


@dataclass
class Token:
    """A generated token that its client sees: where it begins in the answer, and how likely it was when asked for."""

    id: int
    logprob: TokenLogprob | None
    offset: int


@dataclass
class Piece:
    """Text and tokens that one choice gained, and how it ended if it has."""

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
    """One of a request's answers. offsets: None when no log-probabilities are asked for, and no token is kept."""

    def __init__(self, number: int, text: TextStream, offsets: Offsets | None):
        self.number = number
        self.done = False
        self._text, self._offsets = text, offsets
        self._held: list[Token] = []
        self._given = 0  # characters

    def take(self, event: TokenEvent) -> Piece:
        """What one event adds. `done` says whether the answer has ended, by a stop string too."""
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
