"""Progress of long work on a pseudo-terminal, on one that cannot move its cursor, and in a file."""

import subprocess
import sys

import pytest
from paths import ROOT
from pseudo_terminal import lines_shown, on_a_terminal

# Time is counted, not waited for: every look at the clock is a fifth of a second later than the last.
WORK = """
import itertools, sys, time
clock = itertools.count()
time.monotonic = lambda: next(clock) / 5
from aquila_pd.utils.progress import Bar, Progress
with Progress("write", total=6_000_000, tensors=6) as progress:
    for step in range(6):
        progress.advance(1_000_000)
        if step == 2:
            print("[red]on stdout[/red]")
        if step == 3:
            print("on stderr", file=sys.stderr)
bar = Bar("chat:")
try:
    bar.update("7 rows, " + "x" * 300)
    if "interrupt" in sys.argv:
        raise KeyboardInterrupt
finally:
    bar.close()
print("rich was loaded:", "rich" in sys.modules)
"""
LAST = "  write     6/6 tensors, 6.0 MB, "


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_bar_fits_the_width_and_what_is_printed_stands_above_it(columns):
    lines = lines_shown(on_a_terminal(WORK, columns=columns))
    assert max(map(len, lines)) <= columns
    bars = [line for line in lines if line.startswith("  write")]
    assert "6/6 tensors" in bars[-1] and any("3/6 tensors" in line for line in bars)
    assert {"[red]on stdout[/red]", "on stderr", "rich was loaded: True"} <= set(lines)
    if columns > 40:
        assert all("━" in line for line in bars)
        assert len(bars[-1]) == columns, "the bar takes what the words leave"
    (words,) = {line for line in lines if line.startswith("  chat: 7 rows, x")}
    assert words.endswith("…") and len(words) == columns


def test_nothing_of_the_bar_is_left():
    written = on_a_terminal(WORK)
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 2, "the cursor is hidden and shown again"
    assert "\x1b[2K" in written.rpartition("…")[2], "the line is erased"


def test_the_cursor_comes_back_when_the_work_is_interrupted():
    written = on_a_terminal(WORK, "interrupt")
    assert "KeyboardInterrupt" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_without_colours_there_is_a_bar_and_no_colour():
    written = on_a_terminal(WORK, NO_COLOR="1")
    assert "━" in written and "\x1b[3" not in written
    assert "\x1b[3" in on_a_terminal(WORK), "the control"


def test_a_terminal_without_unicode_gets_a_bar_of_ascii():
    lines = lines_shown(on_a_terminal(WORK, PYTHONIOENCODING="ascii", columns=60))
    assert any(line.startswith("  write") and "----" in line for line in lines)
    assert "rich was loaded: True" in lines


@pytest.mark.parametrize("how", [{"TERM": "dumb"}, {"to_file": "stderr"}], ids=["dumb", "stderr in a file"])
def test_where_no_bar_can_be_drawn_there_are_lines_and_rich_is_not_loaded(how):
    written = on_a_terminal(WORK, **how)
    assert "\x1b" not in written
    lines = written.splitlines()
    assert lines[-2].startswith(LAST) and lines[-1] == "rich was loaded: False"


def test_what_goes_to_a_file_is_not_drawn_into_the_bar():
    assert "on stdout" not in on_a_terminal(WORK, to_file="stdout")


def test_without_a_terminal_there_is_a_line_every_so_often_and_at_the_end():
    code = WORK.replace("/ 5", "* 3")  # 6 seconds a step: it looks twice at the clock
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    written = [line for line in done.stdout.splitlines() if line.startswith("  write")]
    assert 1 < len(written) < 6 and written[-1].startswith(LAST)
    assert all(line.endswith(" left") for line in written[:-1]) and not written[-1].endswith(" left")
    assert done.stderr == "on stderr\n"
