"""Layout of a run folder.

RUN/
  manifest.json              what was trained on, with what, and what came out (manifest.py)
  run.lock                   held by the process that trains here
  log.jsonl, curve.png       what the run said
  ranks/                     what ranks other than 0 said on their terminals: rank-1.log ...
  data/STAGE/                prepared rows; beside them, in STAGE-plans, the packs of each epoch
  stages/STAGE/checkpoints/  step-00000120/ ...; damaged-step-... is one that was found damaged and put aside
  stages/STAGE/result/       a model folder, or an adapter; it is there when the stage is done
  stages/STAGE/merged/       an adapter merged into its base, where a later stage wants that
  model/                     the last stage's result as a plain model folder
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The places of one run, by the name of a stage."""

    root: Path

    def data(self, stage: str) -> Path:
        return self.root / "data" / stage

    def plans(self, stage: str, part: str) -> Path:
        """Packs of the rows to train on or to evaluate on. part: the name of their folder."""
        return self.root / "data" / f"{stage}-plans" / part

    def checkpoints(self, stage: str) -> Path:
        return self.root / "stages" / stage / "checkpoints"

    def result(self, stage: str) -> Path:
        return self.root / "stages" / stage / "result"

    def merged(self, stage: str) -> Path:
        return self.root / "stages" / stage / "merged"

    @property
    def ranks(self) -> Path:
        return self.root / "ranks"

    @property
    def model(self) -> Path:
        return self.root / "model"
