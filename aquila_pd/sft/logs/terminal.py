"""Terminal log: a progress bar on a terminal, a line at intervals anywhere else."""

from typing import TextIO

from .records import EvalRecord, Reported, StageInfo
from .words import eval_line, left_words, stage_lines, step_line, step_words

NAME_WIDTH, LEFT_WIDTH = 20, 16  # characters of a stage's name, and of "10 h 59 min left"
PER_SECOND = 8  # times the bar is drawn at most


def screen(stream: TextIO) -> "Lines | Bar":
    """A bar where the stream is a terminal that can move its cursor, lines elsewhere."""
    from rich.console import Console

    console = Console(file=stream, highlight=False, soft_wrap=False)
    return Bar(console) if console.is_terminal and not console.is_dumb_terminal else Lines(stream)


class Lines:
    """One line for every log_every-th step, and for the last."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.every = 1

    def start(self, info: StageInfo) -> None:
        self.every = info.log_every
        self.said("\n".join(stage_lines(info)))

    def step(self, reported: Reported) -> None:
        if is_due(reported, self.every):
            self.said(step_line(reported))

    def evaluated(self, record: EvalRecord) -> None:
        self.said(eval_line(record))

    def said(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        pass


class Bar:
    """Two lines that stay at the bottom; what is said goes above them.

    chat ━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━  240/400  loss 1.2345  3 min 5 s left
      lr 8.10e-06  grad 0.840  1,234 tok/s each  pad 0.4%  MFU 41%  GPU 61.2 GiB
    """

    def __init__(self, console):
        self.console = console
        self.live = None
        self.drawn = 0.0

    def start(self, info: StageInfo) -> None:
        from rich.live import Live

        self.close()
        self.said("\n".join(stage_lines(info)))
        self.live = Live(console=self.console, auto_refresh=False, transient=False)
        self.live.start()

    def step(self, reported: Reported) -> None:
        if self.live is not None:
            now = self.console.get_time()
            due = now - self.drawn >= 1 / PER_SECOND
            self.drawn = now if due else self.drawn
            self.live.update(_panel(reported), refresh=due)

    def evaluated(self, record: EvalRecord) -> None:
        self.said(eval_line(record))

    def said(self, text: str) -> None:
        if self.live is not None:
            self.live.refresh()  # or the bar below the text would be the one drawn last
        self.console.print(text, markup=False, emoji=False)

    def close(self) -> None:
        """Leave the bar as it stands and give the cursor back."""
        if self.live is not None:
            self.live.refresh()
            self.live.stop()
            self.live = None


def is_due(reported: Reported, every: int) -> bool:
    """Whether people are told of this step."""
    record = reported.record
    return record.step % every == 0 or record.step in (1, record.steps)


def _panel(reported: Reported):
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    record = reported.record
    bar = ProgressBar(
        total=record.steps, completed=record.step, complete_style="cyan", finished_style="green", style="bright_black"
    )
    # as wide on every step, so that the bar's length does not tremble
    counts = f"{record.step:>{len(str(record.steps))}}/{record.steps}"
    words = f" {counts}  loss {record.loss:.4f}  {left_words(reported):<{LEFT_WIDTH}}"
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(max_width=NAME_WIDTH, no_wrap=True, overflow="ellipsis")
    row.add_column(ratio=1, no_wrap=True)
    row.add_column(no_wrap=True)
    row.add_row(record.stage, bar, words)
    return Group(row, Text("  " + "  ".join(step_words(reported)), style="dim", no_wrap=True, overflow="ellipsis"))
