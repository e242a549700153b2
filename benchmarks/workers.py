"""The other end of process.py: starts one side, asks it, and says what went wrong when it does not answer."""

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT

ANSWER_SECONDS = 1200.0  # after that a side counts as hung


class SideFailed(Exception):
    """A side did not start, raised, ended or hung; the message says which."""


class Worker:
    """One side in its own process, from `with` to its end."""

    def __init__(self, asked: dict, *, environment: dict[str, str], timeout: float = ANSWER_SECONDS):
        self.timeout = timeout
        self.noise = tempfile.TemporaryFile("w+")  # noqa: SIM115 (close() ends it)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("process.py")), json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.noise,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        try:
            self._reply()
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict) -> dict:
        """Its answer. Raises SideFailed; after an ordinary error it can be asked again."""
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except OSError:
            raise SideFailed(f"the process has ended{self._last_words()}") from None
        return self._reply()

    def _reply(self) -> dict:
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout)
        if not ready:
            self.process.kill()
            raise SideFailed(f"no answer within {self.timeout:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise SideFailed(f"the process ended with status {status}{self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise SideFailed(reply["error"])
        return reply

    def _last_words(self) -> str:
        self.noise.seek(0)
        lines = self.noise.read().strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def close(self) -> None:
        """End the process; it holds nothing worth keeping."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            stream.close()
        self.noise.close()
