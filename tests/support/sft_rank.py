"""One rank of a run of several processes: python sft_rank.py FOLDER OUTPUT SETTINGS (JSON). Prints its losses.

SETTINGS: keywords of sft_factory.stage, and `resume`, `kill_after` (SIGKILL behind that step's record), `model` sizes.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1, 2)]

# isort: off
import conftest  # noqa: E402, F401  the environment of tests, before paddle is loaded

# isort: on
import sft_factory  # noqa: E402
from paddle.distributed import parallel  # noqa: E402
from paddlenlp.utils.log import logger  # noqa: E402

from aquila_pd.sft.run.launch import leave, rank  # noqa: E402

logger.set_level("WARNING")
parallel._global_parallel_env = None  # in a fork of a warm process: read there, before this rank's environment
folder, output, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
resume, kill_after = settings.pop("resume", False), settings.pop("kill_after", None)


class Deadly(sft_factory.Recorder):
    def step(self, record) -> None:
        super().step(record)
        if record.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


sft_factory.Recorder = Deadly
reporter = sft_factory.run(folder, sft_factory.stage(**settings), resume=resume)
if rank() == 0:
    said = {
        "steps": [[record.step, record.loss, record.grad_norm] for record in reporter.steps],
        "said": reporter.texts,
    }
    output.write_text(json.dumps(said))
leave(0)  # as the command's ranks do
