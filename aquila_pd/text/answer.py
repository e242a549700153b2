"""Answer: a listener that detokenizes one sequence and stops it at stop strings; run(): the engine's step loop."""

from collections.abc import Callable, Iterable

from ..generation import Engine, Sequence, TokenEvent
from .text_stream import TextStream


class Answer:
    """Incremental text of one sequence: a listener for `Engine.add`.

    say: called with each new piece of text. stop, strip_start, follows: see TextStream.
    The token that ended the sequence is no text, whether the tokenizer calls it special or not.
    """

    def __init__(
        self,
        tokenizer,
        *,
        say: Callable[[str], None] | None = None,
        stop: Iterable[str] = (),
        strip_start: bool = False,
        follows: bool = False,
    ):
        self._stream = TextStream(tokenizer, stop, strip_start, follows=follows)
        self._say = say

    def __call__(self, event: TokenEvent) -> bool:
        """Handle a token event; True when a stop string ends the answer."""
        piece = ""
        if event.token is not None and event.token != event.sequence.stop_id:
            piece = self._stream.push(event.token)
        if event.finish_reason is not None:
            piece += self._stream.finish()
        if piece and self._say is not None:
            self._say(piece)
        return self._stream.stop_string is not None

    @property
    def text(self) -> str:
        return self._stream.text

    @property
    def stop_string(self) -> str | None:
        return self._stream.stop_string


def run(engine: Engine, sequences: Iterable[Sequence], *, until: Callable[[], bool] = lambda: False) -> None:
    """Step the engine until the sequences have ended. Any exception out of a step, Ctrl-C too, resets the engine.

    until: polled between steps; once it returns True, the sequences that still run are cancelled.
    """
    sequences = list(sequences)
    try:
        while any(sequence.finish_reason is None for sequence in sequences) and not until():
            engine.step()
    except BaseException as error:
        engine.reset(error if isinstance(error, Exception) else None)
        raise
    for sequence in sequences:
        engine.cancel(sequence)


def raise_error(sequence: Sequence) -> None:
    """Raise the error that ended a sequence, if there is one."""
    if sequence.error is not None:
        raise sequence.error
