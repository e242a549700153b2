"""Terminal log: a progress bar on a terminal, a line at intervals anywhere else."""

from typing import TextIO

from ...utils.progress import Display, bar_row, can_draw
from .records import EvalRecord, Reported, StageInfo
from .words import eval_line, left_words, stage_lines, step_line, step_words

LEFT_WIDTH = 16  # characters of "10 h 59 min left"


def screen(stream: TextIO) -> "Lines | Bar":
    """A bar where the stream is a terminal that can move its cursor, lines elsewhere."""
    return Bar(stream) if can_draw(stream) else Lines(stream)


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
    """Two lines that stay at the bottom; other lines scroll above them.

    chat ━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━  240/400  loss 1.2345  3 min 5 s left
      lr 8.10e-06  grad 0.840  1,234 tok/s each  pad 0.4%  MFU 41%  GPU 61.2 GiB
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.display = Display(stream, transient=False)

    def start(self, info: StageInfo) -> None:
        self.close()
        self.said("\n".join(stage_lines(info)))
        self.display = Display(self.stream, transient=False)

    def step(self, reported: Reported) -> None:
        self.display.show(_panel(reported))

    def evaluated(self, record: EvalRecord) -> None:
        self.said(eval_line(record))

    def said(self, text: str) -> None:
        self.display.print(text)

    def close(self) -> None:
        """Leave the bar as it stands and give the cursor back."""
        self.display.close()


def is_due(reported: Reported, every: int) -> bool:
    """Whether this step gets a line."""
    record = reported.record
    return record.step % every == 0 or record.step in (1, record.steps)


def _panel(reported: Reported):
    from rich.console import Group
    from rich.text import Text

    record = reported.record
    # as wide on every step, so that the bar's length does not tremble
    counts = f"{record.step:>{len(str(record.steps))}}/{record.steps}"
    words = f" {counts}  loss {record.loss:.4f}  {left_words(reported):<{LEFT_WIDTH}}"
    details = Text("  " + "  ".join(step_words(reported)), style="dim", no_wrap=True, overflow="ellipsis")
    return Group(bar_row(record.stage, record.step, record.steps, words), details)
