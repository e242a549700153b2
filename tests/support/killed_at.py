"""`aquila-pd ARGUMENTS`, killed at an event of its run folder: python killed_at.py RUN EVENT PATH ARGUMENTS.

Counted are files and folders in RUN with the pattern PATH in their names that are made, opened to write, renamed or
removed; at the event of that number the process gets SIGKILL, at none where EVENT is 0. Prints their number at the end.
"""

import os
import re
import signal
import sys

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Count:
    """An audit hook that counts events, and kills this process at one of them."""

    def __init__(self, run: str, kill_at: int, path: str):
        self.run, self.kill_at, self.path = run, kill_at, re.compile(path)
        self.seen, self.me = 0, os.getpid()

    def __call__(self, event: str, values: tuple) -> None:
        if event not in EVENTS or os.getpid() != self.me or not str(values[0]).startswith(self.run):
            return
        if event == "open" and not (isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if self.path.search(str(values[0])):
            self.seen += 1
            if self.seen == self.kill_at:
                os.kill(self.me, signal.SIGKILL)


if __name__ == "__main__":
    count = Count(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    sys.addaudithook(count)
    from aquila_pd import cli

    status = cli.main(sys.argv[4:])
    print("events", count.seen, flush=True)
    sys.exit(status)
