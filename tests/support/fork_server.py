"""Fork server: a Python process that has imported what tests need and forks for each request.

    done = warm().run(["-m", "aquila_pd.cli", "doctor"])             # as subprocess.run([sys.executable, ...]) would
    process = warm().start(["-c", code], stdout=file, stderr=file)   # as subprocess.Popen would

Importing paddle, paddlenlp and the package costs seconds of processor time, a fork milliseconds. The child runs `-c`,
`-m` or a script with arguments, environment, folder and standard streams of its own and ends as an interpreter does:
threads, exit handlers, status, signals. What a test wants to prove about the start itself (import order, a variable
that is read on import, PYTHON* variables of the interpreter) needs a real process. All children of one server share
its hash seed.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
NUMBER = struct.Struct("q")

CONVERTER = (
    "tokenizers",
    "tqdm",
    "aquila_pd.tokenization.convert",
    "aquila_pd.checkpoint.sources.packed",
    "aquila_pd.checkpoint.sources.safetensors",
    "aquila_pd.checkpoint.command",
)
EVERYTHING = ("aquila_pd", "paddle", "paddlenlp.trainer", "aquila_pd.sft.command", "aquila_pd.sft.run.stages")


# ------------------------------------------------------------------------------------------------ in the test


class Forked:
    """A process of a fork server: what subprocess.Popen has, except communicate()."""

    def __init__(self, arguments: list[str], channel: socket.socket):
        self.args, self.returncode = arguments, None
        self.stdin = self.stdout = self.stderr = None
        self._channel = channel
        self.pid = self._number()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal."""
        if self.returncode is None:
            self._channel.settimeout(timeout)
            try:
                self.returncode = self._number()
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._channel.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _number(self) -> int:
        found = b""
        with contextlib.suppress(ConnectionResetError):
            found = self._channel.recv(NUMBER.size, socket.MSG_WAITALL)
        if len(found) < NUMBER.size:
            raise RuntimeError("the fork server ended: its stderr says why")
        return NUMBER.unpack(found)[0]


class ForkServer:
    """Imports `preload` from `path` once; start() and run() fork from there."""

    def __init__(self, preload: Sequence[str], *, path: Sequence[str] | None = None):
        if path is None:
            from paths import IMPORTED as path
        self._control, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("PYTHONUNBUFFERED", None)  # each request decides
        command = [sys.executable, __file__, str(theirs.fileno()), *preload]
        self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=DEVNULL)
        theirs.close()
        atexit.register(self.close)

    def start(
        self,
        arguments: Sequence[object],
        *,
        stdin=DEVNULL,
        stdout=None,
        stderr=None,
        env: Mapping[str, str] | None = None,
        cwd: object = None,
        start_new_session: bool = False,
    ) -> Forked:
        """What follows `python` on a command line. A stream: None is this process's own, a file, a descriptor, DEVNULL,
        or PIPE, which gives process.stdin, .stdout and .stderr as text."""
        request = {
            "arguments": [str(argument) for argument in arguments],
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or os.getcwd()),
            "session": start_new_session,
        }
        with contextlib.ExitStack() as stack:
            given = [_stream(i, stream, stack) for i, stream in enumerate((stdin, stdout, stderr))]
            process = self._ask(request, [theirs for theirs, _ in given])
        process.stdin, process.stdout, process.stderr = (ours for _, ours in given)
        return process

    def run(self, arguments: Sequence[object], *, input: str = "", timeout: float = 120, **options):
        """A subprocess.CompletedProcess with what it wrote, as text."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            files[0].write(input.encode())
            files[0].seek(0)
            process = self.start(arguments, stdin=files[0], stdout=files[1], stderr=files[2], **options)
            try:
                status = process.wait(timeout)
            finally:
                process.kill()
            out, err = (_content(file) for file in files[1:])
        return subprocess.CompletedProcess(process.args, status, out, err)

    def close(self) -> None:
        self._control.close()
        self._process.wait()
        atexit.unregister(self.close)

    def _ask(self, request: dict, streams: list[int]) -> Forked:
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"\0"], [theirs.fileno(), *streams])
        with contextlib.suppress(BrokenPipeError):  # Forked says that the server is gone
            ours.sendall(json.dumps(request).encode())
            ours.shutdown(socket.SHUT_WR)
        return Forked(request["arguments"], ours)


def _stream(number: int, stream: object, stack: contextlib.ExitStack) -> tuple[int, object]:
    """The descriptor for the child, closed here with the stack if it was made here, and our end of a pipe or None."""
    if stream is None:
        return number, None
    if stream == DEVNULL:
        return stack.enter_context(open(os.devnull, "r+b", buffering=0)).fileno(), None
    if stream != PIPE:
        return (stream if isinstance(stream, int) else stream.fileno()), None
    reading, writing = os.pipe()
    theirs, ours = (writing, reading) if number else (reading, writing)
    stack.callback(os.close, theirs)
    return theirs, open(ours, "r" if number else "w", encoding="utf-8")


def _content(file) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


@functools.cache
def warm() -> ForkServer:
    """With paddle, paddlenlp and the package; for the whole session."""
    return ForkServer(EVERYTHING)


@functools.cache
def converter() -> ForkServer:
    """With what a conversion needs, which is neither paddle nor torch; for the whole session."""
    return ForkServer(CONVERTER)


# ------------------------------------------------------------------------------------------------ in the server


def _serve(control: socket.socket) -> dict | None:
    """Fork for each request. Returns None when the test process is gone, and in each child its request."""
    running: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> process, where its status is awaited
    waiting = selectors.PollSelector()
    waiting.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fd != control.fileno():
                waiting.unregister(key.fd)
                _report(key.fd, *running.pop(key.fd))
                continue
            _, descriptors, _, _ = socket.recv_fds(control, 1, 4)
            if not descriptors:
                return None
            channel, streams = socket.socket(fileno=descriptors[0]), descriptors[1:]
            request = json.loads(channel.makefile("rb").read())
            child = os.fork()
            if not child:
                _take_over(streams, [control.fileno(), *descriptors, *running])
                return request
            for descriptor in streams:
                os.close(descriptor)
            _tell(channel, child)
            running[pidfd := os.pidfd_open(child)] = (child, channel)
            waiting.register(pidfd, selectors.EVENT_READ)


def _take_over(streams: list[int], unwanted: list[int]) -> None:
    """In the child: the standard streams of the request, and nothing open that belongs to the server."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in unwanted:
        os.close(descriptor)


def _report(pidfd: int, child: int, channel: socket.socket) -> None:
    os.close(pidfd)
    _tell(channel, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    channel.close()


def _tell(channel: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        channel.sendall(NUMBER.pack(number))


def _become(request: dict) -> None:
    """In the child: run what the arguments ask for, as `python ARGUMENTS` would; returns or raises as that does."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # new ones: those of the server remember whether its own files could seek
    lines = os.isatty(1) or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if lines else -1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    first, *more = request["arguments"]
    if first == "-c":
        _see("", ["-c", *more[1:]])
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(more[0], "<string>", "exec"), module.__dict__)
    elif first == "-m":
        _see(request["folder"], more)
        sys.modules.pop(more[0], None)  # it may be preloaded; it runs once more, as __main__
        runpy.run_module(more[0], run_name="__main__", alter_sys=True)
    else:
        _see(os.path.dirname(os.path.abspath(first)), request["arguments"])
        runpy.run_path(first, run_name="__main__")


def _end(run: Callable[[dict], None], request: dict) -> None:
    """Run, and leave as an interpreter does. Its last part, which takes apart every loaded module, is left out: with
    paddle that is a second of processor time."""
    try:
        try:
            run(request)
        finally:
            threading._shutdown()
            atexit._run_exitfuncs()
    except SystemExit as ended:
        status = _status(ended.code)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    else:
        status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError:
            sys.excepthook(*sys.exc_info())
            status = 120  # as an interpreter that cannot write its last output
    os._exit(status)


def _status(code: object) -> int:
    if code is None or isinstance(code, int):
        return int(code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _see(first: str, argv: list[str]) -> None:
    """The sys.argv and sys.path of a new interpreter: the program's own place, PYTHONPATH, installed packages."""
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.argv, sys.path[:] = argv, [first, *places, *INSTALLED]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end and with them this
    before = {str(Path(place).resolve()) for place in [sys.path[0], *os.environ["PYTHONPATH"].split(os.pathsep)]}
    INSTALLED = [place for place in sys.path if str(Path(place).resolve()) not in before]
    for name in sys.argv[2:]:
        __import__(name)
    gc.collect()
    gc.freeze()  # a child that collects garbage would copy every page of what was loaded
    if (asked := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        _end(_become, asked)
