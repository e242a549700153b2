"""TextStream: incremental detokenization with stop strings; text goes out as soon as no later token can change it.

A token alone does not determine its text: a Chinese character or an emoji may be spread over several tokens, and text
may prove to be the beginning of a stop string. Nothing is decoded twice; each token costs the same.
"""

import codecs
import json
from collections.abc import Iterable

from ..formats.byte_level import LETTERS
from ..utils.errors import GenerationError, TokenizerError

SPACE = "\u2581"  # how SentencePiece spells a space
DAMAGED = "\ufffd"
BYTE_TOKENS = {f"<0x{value:02X}>": value for value in range(256)}


class ByteLevelText:
    """Incremental decoder of byte-level BPE tokens: one UTF-8 stream, invalid bytes as U+FFFD.

    as_written: added tokens that are no bytes though their letters look like it. Aquila's vocabularies have none. Where
    one comes later, decode() does not join a character's bytes across a special token; here they are joined by then.
    """

    def __init__(self, as_written: frozenset[str] = frozenset()):
        self._as_written = as_written
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> str:
        """The text that is certain with this token; bytes that a later token may complete stay here."""
        if token in self._as_written:
            return self.finish() + token
        try:
            data = bytes(LETTERS[letter] for letter in token)
        except KeyError:  # an added token
            data = token.encode("utf-8")
        return self._utf8.decode(data)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class SentencePieceText:
    """Incremental decoder of SentencePiece tokens: pieces, and runs of byte-fallback tokens.

    A run is decoded as a whole: one wrong byte at its end makes U+FFFD of every byte before it. So nothing of a run is
    certain until a piece follows. strip: how many spaces the very beginning of the text loses.
    """

    def __init__(self, strip: int = 0):
        self._strip = strip
        self._run = bytearray()

    def push(self, token: str) -> str:
        """The text that is certain with this token; a run of bytes stays here until it has ended."""
        if token in BYTE_TOKENS:
            self._run.append(BYTE_TOKENS[token])
            return ""
        return self.finish() + self._stripped(token.replace(SPACE, " "))

    def finish(self) -> str:
        data = bytes(self._run)
        self._run.clear()
        try:
            return self._stripped(data.decode("utf-8"))
        except UnicodeDecodeError:
            return self._stripped(DAMAGED * len(data))

    def _stripped(self, text: str) -> str:
        """The text without the spaces that the beginning still loses."""
        cut = min(self._strip, len(text) - len(text.lstrip(" ")))
        self._strip = self._strip - cut if cut == len(text) else 0
        return text[cut:]


class StopStrings:
    """Stop-string matching on streamed text: holds back what may begin a stop string, cuts before the first match."""

    def __init__(self, stop: Iterable[str]):
        self._stop = tuple(stop)
        if "" in self._stop:
            raise GenerationError("An empty stop string would end every answer before it begins. Leave it out.")
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What can go out now. Nothing more once a stop string is found."""
        self._held += text
        place, stop = self._first_match()
        open_from = self._open_from()
        if stop is not None and place <= open_from:
            return self._end(place, stop)
        out, self._held = self._held[:open_from], self._held[open_from:]
        return out

    def finish(self) -> str:
        """The rest: a stop string that has only begun is text."""
        place, stop = self._first_match()
        if stop is not None:
            return self._end(place, stop)
        out, self._held = self._held, ""
        return out

    def _end(self, place: int, stop: str) -> str:
        out, self._held, self.found = self._held[:place], "", stop
        return out

    def _first_match(self) -> tuple[int, str | None]:
        found = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        return min(found, key=lambda match: match[0], default=(0, None))

    def _open_from(self) -> int:
        """Where the first stop string begins that more text may complete; the length when there is none."""
        held = self._held
        begins = range(max(len(held) - self._longest + 1, 0), len(held))
        return next((i for i in begins if any(stop.startswith(held[i:]) for stop in self._stop)), len(held))


class TextStream:
    """Incremental text of one sequence.

    All that push() and finish() return, joined, is tokenizer.decode(ids, skip_special_tokens=True), cut before the
    stop string that begins first. No U+FFFD goes out that a later token would turn into a character.

    stop: texts that end the answer. strip_start: white space at the beginning is left out, before stop strings are
    looked for. follows: the answer goes on with another text, so a SentencePiece model keeps the space in front.
    text: what has gone out so far; stop_string: the one that was found, or None.
    Raises GenerationError for an empty stop string, TokenizerError for a tokenizer of a kind that is not known.
    """

    def __init__(self, tokenizer, stop: Iterable[str] = (), strip_start: bool = False, *, follows: bool = False):
        self._token_of = tokenizer.backend.id_to_token
        self._left_out = frozenset(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._decoded = text_of(tokenizer, follows=follows)
        self._stop = StopStrings(stop)
        self._strip_start = strip_start
        self.text = ""

    @property
    def stop_string(self) -> str | None:
        return self._stop.found

    def push(self, token_id: int) -> str:
        """The text that is certain now; "" for a special token, and always once a stop string was found."""
        token = self._token_of(token_id)
        if token is None or token in self._left_out or self._stop.found is not None:
            return ""
        return self._out(self._stop.push(self._begun(self._decoded.push(token))))

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self._stop.found is not None:
            return ""
        rest = self._stop.push(self._begun(self._decoded.finish()))
        return self._out(rest + ("" if self._stop.found is not None else self._stop.finish()))

    def _begun(self, text: str) -> str:
        """The text, without the white space at the beginning where that is not wanted."""
        if self._strip_start:
            text = text.lstrip()
            self._strip_start = not text
        return text

    def _out(self, text: str) -> str:
        self.text += text
        return text


def text_of(tokenizer, *, follows: bool = False) -> ByteLevelText | SentencePieceText:
    """An incremental decoder equal to the tokenizer's own; a new one for each answer."""
    decoder = json.loads(tokenizer.backend.decoder.__getstate__()) if tokenizer.backend.decoder else {}
    if decoder.get("type") == "ByteLevel":
        return ByteLevelText(frozenset(tokenizer.added_tokens_decoder[i].content for i in tokenizer._decode_alone))
    steps = decoder.get("decoders", [])
    replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    if steps[:3] == [replace, {"type": "ByteFallback"}, {"type": "Fuse"}] and len(steps) < 5:
        strip = steps[3] if len(steps) == 4 else {"type": "Strip", "content": " ", "start": 0, "stop": 0}
        if strip == {"type": "Strip", "content": " ", "start": strip.get("start"), "stop": 0}:
            return SentencePieceText(0 if follows else strip["start"])
    kinds = [step.get("type") for step in steps] or [decoder.get("type")]
    raise TokenizerError(
        f"This tokenizer decodes with {', '.join(map(str, kinds))}; text can be streamed from byte-level BPE and from "
        "SentencePiece with bytes.\nUse the model's original tokenizer files."
    )
