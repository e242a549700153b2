"""Reporter: fans log records out to log.jsonl, the terminal, VisualDL on request, and the loss curve at the end."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from . import curve, jsonl
from .memory import memory_reader
from .records import Clock, EvalRecord, Reported, StageInfo, StepRecord
from .terminal import screen
from .visualdl import FOLDER, Board


class Silent:
    """The reporter of every rank but the first: takes everything and says nothing."""

    def start(self, info: StageInfo) -> None: ...
    def step(self, record: StepRecord) -> None: ...
    def evaluated(self, record: EvalRecord) -> None: ...
    def saved(self, path: Path) -> None: ...
    def said(self, text: str) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *error: object) -> None: ...


class Reporter:
    """Reports a run of several stages into its folder.

    stages: their names in order. resume: (stage, step) of the checkpoint the run goes on from; what the log says of
    later is cut off, and that is said. device: as paddle.get_device() names it, for memory.

        with Reporter(folder, stages=names) as reporter:
            reporter.start(StageInfo(...)); reporter.step(StepRecord(...)); ...
            reporter.finish()

    Leaving the block, for whatever reason, gives the terminal back and closes the files.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stages: Sequence[str],
        resume: tuple[str, int] | None = None,
        device: str = "cpu",
        stream: TextIO | None = None,
    ):
        self.folder, self.stages = Path(folder), tuple(stages)
        self.log = self.folder / jsonl.NAME
        self._memory: Callable[[], dict[str, float]] = memory_reader(device)
        cut = self._open_log(*(resume or (self.stages[0], 0)))
        self._screen = screen(stream or sys.stdout)
        self._board: Board | None = None
        self._at = {"stage": "", "step": 0}  # where the run is, for records that are of no step
        for line in cut:
            self.said(line)

    def start(self, info: StageInfo) -> None:
        """A stage begins, or goes on from info.step: what the log says of later steps is cut off here, too, as the
        newest checkpoint may have turned out to be damaged."""
        self._info, self._clock = info, Clock(info.step)
        self._at = {"stage": info.stage, "step": info.step}
        self._lines.close()
        for line in self._open_log(info.stage, info.step):
            self.said(line)
        self._close_board()
        if info.visualdl:
            earlier = (record for record in jsonl.read_log(self.log) if record["stage"] == info.stage)
            self._board = Board(self.folder / FOLDER / info.stage, earlier)
        self._write("stage", {**self._at, "steps": info.steps, "facts": dict(info.facts)})
        self._show("start", info)

    def step(self, record: StepRecord) -> None:
        """A step of the stage that was started last."""
        self._at = {"stage": record.stage, "step": record.step}
        reported = Reported(record, record.mfu(self._info), self._clock.left(record), self._memory())
        self._write("step", reported.to_json())
        self._show("step", reported)

    def evaluated(self, record: EvalRecord) -> None:
        self._write("eval", vars(record))
        self._show("evaluated", record)

    def saved(self, path: Path) -> None:
        """A checkpoint, or a result, is complete. Named from the run folder on, which may be moved."""
        inside = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
        self._write("saved", {**self._at, "path": str(inside)})
        self._show("said", f"{self._at['stage']}  step {self._at['step']}: saved {inside}")

    def said(self, text: str) -> None:
        """Anything else a person should know."""
        self._write("said", {**self._at, "text": text})
        self._show("said", text)

    def finish(self) -> None:
        """All stages are done: the picture is drawn, everything is closed."""
        picture = self.folder / curve.NAME
        if curve.draw_curve(self.log, picture, stages=self.stages):
            self._show("close")
            self.said(f"The loss in a picture: {picture}")
        self.close()

    def close(self) -> None:
        """Give the terminal back and close the files; may be called again."""
        self._show("close")
        self._close_board()
        self._lines.close()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open_log(self, stage: str, step: int) -> list[str]:
        """Open the log behind a step; what was cut off, in words."""
        cut = jsonl.cut_log(self.log, stages=self.stages, stage=stage, step=step)
        self._lines = jsonl.JsonLines(self.log)
        return cut

    def _write(self, kind: str, record: dict) -> None:
        self._lines.write(kind, record)
        if self._board is not None:
            self._board.write({"kind": kind, **record})

    def _show(self, what: str, *values: object) -> None:
        """Show on the terminal. One that is gone (a closed window, a broken pipe) does not end days of training."""
        if self._screen is None:
            return
        try:
            getattr(self._screen, what)(*values)
        except (OSError, ValueError) as error:  # ValueError: a stream that was closed
            self._screen = None
            self._write("said", {**self._at, "text": f"The terminal is gone ({error}); the log goes on in this file."})

    def _close_board(self) -> None:
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
            self._board = None


def open_reporter(folder: Path, *, rank: int, **options: object) -> Reporter | Silent:
    """A Reporter for rank 0, and silence for all others. options: those of Reporter."""
    return Reporter(folder, **options) if rank == 0 else Silent()
