"""A Python process on a pseudo-terminal of a given width, and what it wrote there."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(code: str, *arguments: str, columns: int = 80, to_file: str = "", **environment: str) -> str:
    """What the terminal got from `python -c code arguments`. to_file: "stdout" or "stderr" goes nowhere instead."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    streams = {"stdout": theirs, "stderr": theirs} | ({to_file: subprocess.DEVNULL} if to_file else {})
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    found = {**kept, "TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=theirs, env=found, **streams)
    os.close(theirs)
    written = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    process.wait(60)
    os.close(ours)
    return written.decode()


def lines_shown(written: str) -> list[str]:
    """Every line that the terminal had at some time, without colours and movements of the cursor."""
    return [line.rstrip() for line in CONTROL.sub("", written).replace("\r", "\n").split("\n") if line.strip()]
