"""Streaming row readers: JSON Lines, JSON arrays, parquet; lines and arrays also gzipped.

What a row means is not known here (formats.py). A row that cannot be read is handed to `on_bad` and passed over; a
file that cannot be read on raises DataError.
"""

import glob
import gzip
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ..utils.errors import DataError, report, shown_value
from ..utils.files import JSON_ERRORS, lfs_pointer, parse_json, why_not_a_file
from .json_items import Damage, holds_items, read_items

if TYPE_CHECKING:
    from pyarrow import RecordBatch

MAX_LINE = 20_000_000  # bytes; the longest rows that anybody publishes have less than two million
BLANKS = b"\xef\xbb\xbf \t\r\n"  # white space, and the byte order mark's bytes
BATCH = 256  # rows of parquet turned into Python at once
LAST = 5  # bad rows that an error names
LINES, JSON, PARQUET = "lines", "json", "parquet"
KINDS = {".jsonl": LINES, ".ndjson": LINES, ".json": JSON, ".parquet": PARQUET}
UNREADABLE = (OSError, EOFError, zlib.error)  # what files raise, packed ones too

OnBad = Callable[[int, int, str], None]  # file, number, reason


class Row(NamedTuple):
    """One row. file: number of its file, from 0; number: its line, or its place in an array or table, from 1."""

    file: int
    number: int
    value: dict


class Cursor(NamedTuple):
    """The next row to be read: (row.file, row.number + 1) goes on behind a row."""

    file: int = 0
    number: int = 1


BEGINNING = Cursor()


class BadRows:
    """Counts rows that cannot be read, remembers the last of them, and stops at one too many.

    Called as `on_bad`. note: told of each. Raises DataError that names the last few.
    """

    def __init__(self, files: Sequence[Path], limit: int, note: Callable[[str], None] = lambda line: None):
        self.count, self.last = 0, deque(maxlen=LAST)
        self._files, self._limit, self._note = files, limit, note

    def __call__(self, file: int, number: int, reason: str) -> None:
        self.count += 1
        line = f"{self._files[file]}, row {number:,}: {reason}"
        self.last.append(line)
        self._note(line)
        if self.count > self._limit:
            headline = f"{self.count:,} rows cannot be read, and no more than {self._limit:,} may. The last of them:"
            raise DataError(report(headline, list(self.last), "Mend the files, or raise max_bad_lines."))


# ------------------------------------------------------------------------------------------------------ which files


def find_files(patterns: Sequence[str], *, also: Sequence[str] = ()) -> list[list[Path]]:
    """The files of each pattern: a path, or a glob's files sorted by name ("**" goes into folders).

    also: endings of names that the caller reads beside those of rows.
    Raises DataError naming every pattern that finds nothing, file of no known kind, and file that is found twice.
    """
    found, findings = [], []
    first: dict[Path, str] = {}
    for pattern in patterns:
        files = _expand(pattern)
        found.append(files)
        findings += [] if files else [f"{pattern}: no file is called that, and no file fits it as a glob"]
        for file in files:
            wrong = _wrong_with_file(file, also)
            findings += [f"{file} {wrong}"] if wrong else []
            real = file.resolve()
            if real in first:
                findings.append(
                    f"{file} is there twice: {first[real]}, {pattern}; a weight makes its rows count double"
                )
            first[real] = pattern
    if findings:
        raise DataError(report("These files cannot be read:", findings, "Nothing was read."))
    return found


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.exists() or not glob.has_magic(pattern):  # a file whose name has brackets is that file
        return [path] if path.exists() or path.is_symlink() else []
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if not Path(name).is_dir()]


def _wrong_with_file(file: Path, also: Sequence[str]) -> str | None:
    wrong = why_not_a_file(file)
    if wrong:
        return wrong + (f"; write {file}/*.jsonl, for example" if file.is_dir() else "")
    kind, packed = _kind(file)
    if (kind is None or (packed and kind is PARQUET)) and file.suffix.lower() not in also:
        return f"is of no known kind; known are {', '.join((*KINDS, *also))}, and lines and arrays with .gz behind it"
    return lfs_pointer(file)


def _kind(file: Path) -> tuple[str | None, bool]:
    """(kind, is it packed by gzip) by a file's name."""
    packed = file.suffix.lower() == ".gz"
    suffix = Path(file.stem).suffix if packed else file.suffix
    return KINDS.get(suffix.lower()), packed


# ------------------------------------------------------------------------------------------------------------- rows


def read_rows(
    files: Sequence[Path], *, on_bad: OnBad, start: Cursor = BEGINNING, columns: Iterable[str] | None = None
) -> Iterator[Row]:
    """The rows of all files in order, from `start`; holds one row of lines, BATCH rows of a table.

    columns: those that are wanted of a table (all if it has none of them); lines come with all their keys.
    Raises DataError for a file that cannot be opened or read on, and what on_bad raises.
    """
    for file in range(start.file, len(files)):
        begin = start.number if file == start.file else 1
        for number, value, wrong in _numbered(files[file], begin, columns):
            if wrong is None and not isinstance(value, dict):
                wrong = f"{shown_value(value)} is no object"
            if wrong is None:
                yield Row(file, number, value)
            else:
                on_bad(file, number, wrong)


Numbered = Iterator[tuple[int, object, str | None]]  # number, value, what is wrong with it


def _numbered(path: Path, begin: int, columns: Iterable[str] | None) -> Numbered:
    kind, packed = _kind(path)
    try:
        if kind is PARQUET:
            yield from _table_rows(path, begin, columns)
        elif kind is LINES or (kind is JSON and _holds_lines(path, packed)):
            yield from _lines(path, packed, begin)
        else:
            yield from _items(path, packed, begin)
    except Damage as damage:
        raise DataError(f"{path} cannot be read to its end: {damage}.\nMend it, or write it as JSON lines.") from damage
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read to its end: {reason}.\nFetch or write the file again.") from error


def _open(path: Path, packed: bool) -> BinaryIO:
    return gzip.open(path, "rb") if packed else path.open("rb")


def _holds_lines(path: Path, packed: bool) -> bool:
    """Whether a .json file holds one object a line, as many do, and not one value."""
    with _open(path, packed) as stream:
        if holds_items(stream):
            return False
    with _open(path, packed) as stream:
        line = b""
        while not line.strip(BLANKS):
            line = stream.readline(MAX_LINE)
            if not line:
                return True  # nothing in it: no rows either way
    value, wrong = _parsed(line)
    return wrong is None and isinstance(value, dict)


def _lines(path: Path, packed: bool, begin: int) -> Numbered:
    with _open(path, packed) as stream:
        number = 0
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            too_long = len(line) > MAX_LINE
            whole = line
            while too_long and whole and not whole.endswith(b"\n"):
                whole = stream.readline(MAX_LINE)
            if number < begin or not line.strip(BLANKS):
                continue
            if too_long:
                yield number, None, f"longer than {MAX_LINE:,} bytes"
            else:
                yield (number, *_parsed(line))


def _parsed(line: bytes) -> tuple[object, str | None]:
    try:
        # a file put together out of several has a byte order mark in the middle
        return parse_json(line.decode("utf-8-sig")), None
    except JSON_ERRORS as error:  # UnicodeDecodeError is one of them
        torn = "" if line.endswith(b"\n") else "; the file ends in the middle of it"
        return None, f"no JSON ({error}){torn}"


def _items(path: Path, packed: bool, begin: int) -> Numbered:
    with _open(path, packed) as stream:
        for number, (value, wrong) in enumerate(read_items(stream), 1):
            if number >= begin:
                yield number, value, wrong


def _table_rows(path: Path, begin: int, columns: Iterable[str] | None) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # buffered: a column of a row group is read in pieces, not whole
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
            names = table.schema_arrow.names
            wanted = [name for name in names if columns is None or name in set(columns)] or names
            group, number = 0, 1  # of the next row; row groups that end before `begin` are not read
            while group < table.num_row_groups and number + table.metadata.row_group(group).num_rows <= begin:
                number += table.metadata.row_group(group).num_rows
                group += 1
            groups = range(group, table.num_row_groups)
            for batch in table.iter_batches(BATCH, row_groups=groups, columns=wanted, use_threads=False):
                skipped = min(max(begin - number, 0), batch.num_rows)
                yield from _table_values(batch.slice(skipped), number + skipped)
                number += batch.num_rows
    except pa.ArrowException as error:
        raise Damage(str(error).splitlines()[0]) from error


def _table_values(batch: "RecordBatch", number: int) -> Numbered:
    """The rows of a batch; where some text in it is not UTF-8, row by row."""
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        for place in range(batch.num_rows):
            try:
                yield number + place, batch.slice(place, 1).to_pylist()[0], None
            except UnicodeDecodeError as error:
                yield number + place, None, f"not UTF-8 text ({error})"
    else:
        yield from ((number + place, value, None) for place, value in enumerate(values))
