"""Rows come out of files one after the other, whatever the kind of file; what cannot be read is named, passed over."""

import gzip
import io
import json
from pathlib import Path

import pytest
from effort import tries
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_rows_factory import chat, write_lines

from aquila_pd.data import json_items, sources
from aquila_pd.data.sources import BadRows, Cursor, Row, find_files, read_rows
from aquila_pd.utils.errors import DataError

ROWS = [chat(f"Frage {i} 你好 😀" + "ä" * i, "b", id=i, label={"ability_en": ["x"]}) for i in range(700)]


def read(*files: Path, limit: int = 0, **more) -> list[Row]:
    return list(read_rows(files, on_bad=BadRows(files, limit), **more))


def read_with_bad(file: Path) -> tuple[list[int], list[tuple[int, str]]]:
    """Numbers of good rows; number and reason of bad ones."""
    bad: list[tuple[int, str]] = []
    good = [row.number for row in read_rows([file], on_bad=lambda _, number, reason: bad.append((number, reason)))]
    return good, bad


def table(file: Path, rows: list[dict], **more) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), file, **more)
    return file


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory) -> list[Path]:
    """The same rows in a file of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    array = folder / "b.json"
    array.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    wrapped = folder / "c.json"
    wrapped.write_text(json.dumps({"version": [1, {"data": 2}], "data": ROWS, "end": "]"}), encoding="utf-8")
    packed_array = folder / "d.json.gz"
    packed_array.write_bytes(gzip.compress(array.read_bytes()))
    return [
        write_lines(folder / "a.jsonl", ROWS),
        array,
        wrapped,
        packed_array,
        write_lines(folder / "e.json", ROWS),  # lines under the name of an array, as they are often published
        write_lines(folder / "f.jsonl.gz", ROWS),
        table(folder / "g.parquet", ROWS, row_group_size=300),
    ]


# ------------------------------------------------------------------------------------------------------ every kind


def test_every_kind_of_file_gives_the_same_rows(every_kind):
    for file in every_kind:
        found = read(file)
        assert [row.value for row in found] == ROWS, file.name
        assert [row.number for row in found] == list(range(1, len(ROWS) + 1)), file.name


def test_files_are_read_in_the_order_given(every_kind):
    found = read(*reversed(every_kind))
    assert [(row.file, row.number) for row in found] == [
        (file, number) for file in range(len(every_kind)) for number in range(1, len(ROWS) + 1)
    ]


@pytest.mark.parametrize("number", [1, 2, 257, 300, 301, 600, 601, 700, 701])
def test_a_cursor_begins_with_exactly_its_row(every_kind, number):
    everything = read(*every_kind)
    for file in range(len(every_kind)):
        found = read(*every_kind, start=Cursor(file, number))
        assert found == [row for row in everything if (row.file, row.number) >= (file, number)]


def test_a_cursor_goes_on_where_reading_stopped(every_kind):
    rows = read_rows(every_kind, on_bad=BadRows(every_kind, 0))
    begun = [next(rows) for _ in range(1000)]
    rest = read(*every_kind, start=Cursor(begun[-1].file, begun[-1].number + 1))
    assert begun + rest == read(*every_kind)


def test_of_a_table_only_the_columns_wanted_are_read(every_kind):
    assert read(every_kind[-1], columns={"id", "absent"})[3].value == {"id": 3}
    assert read(every_kind[-1], columns={"absent"})[3].value == ROWS[3]  # so that a message can say what is there


def test_a_published_table_of_infinity_instruct_is_read(tmp_path):
    row = {
        "id": "0a1b",
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "label": {"ability_en": ["math"], "ability_zh": ["数学"], "cate_ability_en": ["x"], "cate_ability_zh": ["y"]},
        "langdetect": "en",
        "source": "code_exercises",
        "reward": 1.5,
    }
    file = table(tmp_path / "train-00000-of-00075.parquet", [row, {**row, "reward": None}])
    assert [found.value for found in read(file)] == [row, {**row, "reward": None}]


# ------------------------------------------------------------------------------------------------------------ lines


def test_bad_lines_are_named_and_passed_over(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\r\n'  # byte order mark, CR LF
        b"\n   \n"  # empty lines count, and are nobody's fault
        b'{"a": \n'
        b'["no object"]\n'
        b'{"a": 1, "a": 2}\n'
        b'{"a": "\xff"}\n'
        b'\xef\xbb\xbf{"a": 2}\n'  # files put together
        b"\x00\x00\x00\n" + b"[" * 100_000 + b"\n"
        b'{"a": NaN, "b": 1' + b"0" * 5000 + b"}\n"
        b'{"a": "torn'
    )
    good, bad = read_with_bad(file)
    assert good == [1, 8]
    reasons = dict(bad)
    assert list(reasons) == [4, 5, 6, 7, 9, 10, 11, 12]
    assert "is no object" in reasons[5] and "a is there twice" in reasons[6] and "0xff" in reasons[7]
    assert "the file ends in the middle of it" in reasons[12]


def test_a_last_line_without_a_newline_is_a_row(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n{"a": 2}')
    assert read_with_bad(tmp_path / "rows.jsonl") == ([1, 2], [])


def test_lines_are_ended_by_newlines_only(tmp_path):
    rows = [chat("a\u2028b\u2029c\x85d\x0be", "x")]
    assert [row.value for row in read(write_lines(tmp_path / "rows.jsonl", rows))] == rows


def test_a_line_that_is_too_long_is_passed_over_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE", 100)
    lengths = [99, 100, 101, 200, 201, 1000, 100]  # with the newline
    file = tmp_path / "rows.jsonl"
    file.write_text("".join('{"a": "' + "x" * (length - 10) + '"}\n' for length in lengths))
    good, bad = read_with_bad(file)
    assert good == [1, 2, 7]
    assert bad == [(number, "longer than 100 bytes") for number in (3, 4, 5, 6)]


def test_one_bad_row_too_many_stops_and_names_the_last(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join('{"a": 1}\n' if number % 2 else f"bad {number}\n" for number in range(40)))
    notes = []
    bad = BadRows([file], 19, notes.append)
    with pytest.raises(DataError, match="20 rows cannot be read, and no more than 19 may") as caught:
        list(read_rows([file], on_bad=bad))
    assert [line for line in str(caught.value).split("\n") if "row 39:" in line]
    assert "row 29:" not in str(caught.value) and len(notes) == 20  # the last five; all were told of before
    assert len(read(file, limit=20)) == 20


def test_control_without_bad_rows_nothing_stops(tmp_path):
    assert len(read(write_lines(tmp_path / "rows.jsonl", ROWS), limit=0)) == len(ROWS)


# ------------------------------------------------------------------------------------------------- arrays in pieces


@settings(max_examples=tries(50, 150), deadline=None, derandomize=True)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.lists(st.none(), max_size=3)),
        max_size=6,
    ),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.integers(1, 40),
)
def test_an_array_read_in_small_pieces_is_the_array_read_at_once(rows, indent, is_wrapped, chunk):
    whole = {"a": [1, {}], "b": 1234567, "data": rows, "z": {"data": []}} if is_wrapped else rows
    text = json.dumps(whole, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    before, json_items.CHUNK = json_items.CHUNK, chunk
    try:
        if any("\ud800" <= letter <= "\udfff" for letter in text.decode("utf-8", "surrogatepass")):
            return  # no UTF-8
        assert [value for value, _ in json_items.read_items(io.BytesIO(text))] == rows
        for end in range(0, len(text), 7):  # control: a piece of it is not taken for the whole
            with pytest.raises(json_items.Damage):
                list(json_items.read_items(io.BytesIO(text[:end])))
    finally:
        json_items.CHUNK = before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"a": 1},', "Expecting value"),
        ('[{"a": 1} {"a": 2}]', "where ']' belongs"),
        ('[{"a": 1}] more', "text follows the end"),
        ('{"a": 1,\n"b": 2}', 'without a list "data"'),
        ('{\n"data": {"a": 1}}', 'without a list "data"'),
        ('{"data": [],\n"data": [1]}', "is there twice"),
        ('[{"a": "\\x"}]', "Invalid"),
        ("[" * 5000, "recursion"),
    ],
)
def test_a_damaged_array_stops_with_its_place(tmp_path, text, reason):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        read(file)
    assert str(file) in str(caught.value)


def test_rows_before_the_damage_come_out(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[{"a": 1}, {"a": 2}, {"a": ')
    rows = read_rows([file], on_bad=BadRows([file], 0))
    assert [next(rows).value for _ in range(2)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError):
        next(rows)


def test_items_that_are_no_rows_are_bad_rows(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[{"a": 1, "a": 2}, 3, {"a": 3}, null]')
    good, bad = read_with_bad(file)
    assert good == [3] and [number for number, _ in bad] == [1, 2, 4]


def test_files_without_rows_have_none(tmp_path):
    for name, text in {
        "a.jsonl": "",
        "b.json": "",
        "c.json": "\n \n",
        "d.json": "[]",
        "e.json": '{"data": []}',
    }.items():
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name) == [], name


def test_a_long_item_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_items, "MAX_ITEM", 1000)
    monkeypatch.setattr(json_items, "CHUNK", 100)
    (tmp_path / "rows.json").write_text('[{"a": "' + "x" * 10_000 + '"}]')
    with pytest.raises(DataError, match="more than 1,000"):
        read(tmp_path / "rows.json")


# --------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("kind", [0, 5, 6])
def test_a_file_that_cannot_be_read_on_is_named(every_kind, tmp_path, kind):
    file = tmp_path / every_kind[kind].name
    whole = every_kind[kind].read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    if kind == 0:  # control: of lines the rest can be read
        assert len(read(file, limit=1)) > 300
        return
    with pytest.raises(DataError, match="cannot be read to its end") as caught:
        read(file)
    assert str(file) in str(caught.value)


def test_texts_of_a_table_that_are_no_text_are_bad_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array([b"a", b"\xff\xfe", b"c"]).view(pa.utf8())  # as a careless writer does
    pq.write_table(pa.table({"id": texts}), tmp_path / "rows.parquet")
    good, bad = read_with_bad(tmp_path / "rows.parquet")
    assert good == [1, 3] and bad[0][0] == 2 and "not UTF-8" in bad[0][1]


# --------------------------------------------------------------------------------------------------- finding files


def test_globs_are_sorted_and_go_into_folders(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "deep/d.jsonl"):
        write_lines(tmp_path / name, ROWS[:1])
    names = [str(file.relative_to(tmp_path)) for file in find_files([f"{tmp_path}/**/*.jsonl"])[0]]
    assert names == ["a.jsonl", "b.jsonl", "deep/d.jsonl", "deep/er/c.jsonl"]


def test_everything_wrong_with_files_is_said_at_once(tmp_path):
    write_lines(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "lfs.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "x.parquet.gz").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    wrong = [
        "/nowhere/*.jsonl", "absent.jsonl", *(f"{tmp_path}/{name}" for name in ("a.jsonl", "a.jsonl", "notes.txt",
        "lfs.jsonl", "x.parquet.gz", "folder", "link.jsonl", "broken.jsonl")),
    ]  # fmt: skip
    with pytest.raises(DataError) as caught:
        find_files(wrong)
    lines = str(caught.value).split("\n")[1:-1]
    for place, reason in enumerate(
        ("no file fits", "no file fits", "twice", "no known kind", "git lfs pull", "no known kind", "is a folder",
         "twice", "leads nowhere")
    ):  # fmt: skip
        assert reason in lines[place], lines
    assert len(lines) == 9


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    write_lines(tmp_path / "rows[1].jsonl", ROWS[:1])
    assert find_files([f"{tmp_path}/rows[1].jsonl"]) == [[tmp_path / "rows[1].jsonl"]]


def test_real_rows_are_read_without_a_bad_one(shared):
    files = [file for found in find_files([f"{shared}/data/*.jsonl"]) for file in found]
    assert len(read(*files)) == 773
