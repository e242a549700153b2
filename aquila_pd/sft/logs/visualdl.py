"""VisualDL log: scalars for `visualdl --logdir RUN/visualdl`, one folder for each stage."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...utils.errors import InstallationError

STEP_TAGS = ("loss", "lr", "grad_norm", "tokens_per_s")
FOLDER = "visualdl"


class Board:
    """Writes one stage. earlier: its records in log.jsonl, which a run that goes on writes again, because VisualDL's
    files cannot be cut where the run goes on."""

    def __init__(self, folder: Path, earlier: Iterable[Mapping] = ()):
        try:
            from visualdl import LogWriter
        except ImportError as error:
            raise InstallationError(
                'VisualDL is asked for and not installed. Run `pip install "aquila_pd[sft]"`, or leave visualdl out.'
            ) from error
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = LogWriter(logdir=str(folder))
        for record in earlier:
            self.write(record)

    def write(self, record: Mapping) -> None:
        """One record of log.jsonl, of any kind."""
        if record["kind"] == "step":
            for tag in STEP_TAGS:
                self._add(tag, record[tag], record["step"])
        elif record["kind"] == "eval":
            self._add("eval_loss", record["loss"], record["step"])

    def _add(self, tag: str, value: float | str, step: int) -> None:
        self._writer.add_scalar(tag=tag, value=float(value), step=step)

    def close(self) -> None:
        self._writer.close()
