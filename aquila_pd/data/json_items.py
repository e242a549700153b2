"""Streaming reader of large JSON arrays: the items of [...] or {"data": [...]}, one at a time."""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from ..utils.errors import shown

CHUNK = 1 << 20  # bytes read at once
MAX_ITEM = 20_000_000  # characters of one item; what is longer is taken for damage
LIST = "data"  # the key that holds the rows of an object
WHITE = " \t\n\r"


class Damage(Exception):
    """The text is not JSON, or not of this shape, from here on. It cannot be read on behind the place."""


class _Twice(ValueError):
    """An object has a key twice."""


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(f"{shown(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return found


_STRICT = json.JSONDecoder(object_pairs_hook=_unique)
_LENIENT = json.JSONDecoder()  # to find the end of an item that has a key twice


def read_items(stream: BinaryIO) -> Iterator[tuple[object, str | None]]:
    """Every item with what is wrong with it (None for nothing). Holds one item and CHUNK bytes, twice at most.

    Raises Damage where the text is not JSON, is cut off, or holds an item longer than MAX_ITEM.
    """
    text = _Text(stream)
    is_object = text.next() == "{"
    if is_object:
        _enter_list(text)
    text.take("[")
    if text.next() != "]":
        yield text.value()
        while text.next() == ",":
            text.take(",")
            yield text.value()
    text.take("]")
    if is_object:
        _leave_object(text)
    if text.next():
        raise Damage(f"text follows the end at character {text.place:,}")


def holds_items(stream: BinaryIO) -> bool:
    """Whether a text begins as one that read_items reads; looks no further than the list begins."""
    text = _Text(stream)
    if text.next() != "{":
        return text.next() == "["
    try:
        _enter_list(text)
    except Damage:
        return False
    return True


def _enter_list(text: "_Text") -> None:
    """Go to the beginning of the list in {"data": [...]}, past the values of other keys."""
    text.take("{")
    while True:
        if text.next() != '"':
            raise Damage(f'it is an object without a list "{LIST}"')
        key, _ = text.value()
        text.take(":")
        if key == LIST and text.next() == "[":
            return
        text.value()
        if text.next() == "}":
            raise Damage(f'it is an object without a list "{LIST}"')
        text.take(",")


def _leave_object(text: "_Text") -> None:
    while text.next() == ",":
        text.take(",")
        key, _ = text.value()
        if key == LIST:
            raise Damage(f'the key "{LIST}" is there twice')
        text.take(":")
        text.value()
    text.take("}")


class _Text:
    """What has been read and not yet used of a stream; `place` counts characters from its beginning."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._before, self._ended = "", 0, 0, False

    @property
    def place(self) -> int:
        return self._before + self._at

    def next(self) -> str:
        """The next character that is no white space, without using it; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in WHITE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read()

    def take(self, character: str) -> None:
        found = self.next()
        if found != character:
            what = f"{shown(found)!r} stands" if found else "the text ends"
            raise Damage(f"{what} at character {self.place:,}, where {character!r} belongs")
        self._at += 1

    def value(self) -> tuple[object, str | None]:
        """The value that begins here, and what is wrong with it beside its JSON."""
        self.next()
        while True:
            try:
                (found, end), wrong = self._decoded()
            except (json.JSONDecodeError, RecursionError, ValueError) as error:
                self._go_on(error)
                continue
            if end < len(self._text) or self._ended:  # else: a number may go on
                self._at = end
                return found, wrong
            self._read()

    def _decoded(self) -> tuple[tuple[object, int], str | None]:
        try:
            return _STRICT.raw_decode(self._text, self._at), None
        except _Twice as error:
            return _LENIENT.raw_decode(self._text, self._at), str(error)

    def _go_on(self, error: Exception) -> None:
        """Read on when a value is not complete yet; raises Damage when reading on cannot help."""
        place = self._before + error.pos if isinstance(error, json.JSONDecodeError) else self.place
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        if self._ended:
            raise Damage(f"{message} at character {place:,}") from error
        if len(self._text) - self._at > MAX_ITEM:
            raise Damage(f"{message} at character {place:,}, or an item of more than {MAX_ITEM:,}") from error
        self._read()

    def _read(self) -> None:
        """As much again as is waiting: an item is tried again no more often than its length doubles."""
        waiting = len(self._text) - self._at
        raw = self._stream.read(max(CHUNK, waiting))
        self._ended = not raw
        self._before += self._at
        try:
            self._text = self._text[self._at :] + self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            raise Damage(f"it is not UTF-8 text after character {self._before + waiting:,} ({error.reason})") from error
        self._at = 0
