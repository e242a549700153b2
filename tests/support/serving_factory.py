"""Servers for tests: in this process on a thread, or as a command in a process of its own; and what to ask them."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from fork_server import PIPE, warm
from paths import IMPORTED, ROOT

from aquila_pd.serving.app import make_app
from aquila_pd.serving.log import Log
from aquila_pd.serving.server import Server, listen
from aquila_pd.serving.service import Service
from aquila_pd.serving.settings import Settings

PATIENCE = 600.0  # seconds until what a test waits for is given up; a busy machine takes minutes for little
START = (
    "import sys; sys.path[:0] = {paths!r}; from fake_engine import fake_model; import aquila_pd.text.loading as l;"
    " l.load = lambda folder, **options: fake_model(folder, slots=options['slots'], max_length=100_000);"
    " from aquila_pd.serving.command import main; sys.exit(main(sys.argv[1:]))"
)


@contextlib.contextmanager
def running(model, log_file: Path, **settings) -> Iterator["Running"]:
    """A server with this model on a thread of this process."""
    service = Service(model, Settings(**{"name": "tiny", "slots": 4, "max_queue": 8, **settings}), Log(log_file))
    bound = listen("127.0.0.1", 0)
    lines: list[str] = []
    server = Server(make_app(service), service, lines.append)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    wait_for(lambda: lines)
    try:
        with httpx.Client(base_url=lines[0].split()[-1], timeout=PATIENCE) as client:
            yield Running(service, server, client, log_file)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        service.log.close()
        assert not thread.is_alive()


class Running:
    """A server on a thread, and a client of it."""

    def __init__(self, service: Service, server: Server, client: httpx.Client, log_file: Path):
        self.service, self.server, self.client, self.log_file = service, server, client, log_file
        self.url = str(client.base_url)
        self.port = client.base_url.port

    def chat(self, content: str = "hi", **more) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=chat_body(content, **more))

    def complete(self, prompt, **more) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": prompt, **more})

    def metric(self, name: str) -> float:
        return metric(self.client.get("/metrics").text, name)

    def quiet(self) -> bool:
        """Whether nothing runs any more, in the engine or around it."""
        stats = self.service.engine.stats
        return not self.service.running and not stats.running and not stats.waiting


class Brake:
    """Holds an engine before each step that has work, until the test allows it: no test has to be in time.

    with Brake(server, steps=3) as brake: the engine takes three steps, and more after `allow`. Leaving lets it run.
    """

    def __init__(self, server: Running, *, steps: int = 0):
        self.engine = server.service.engine
        self._step, self._free = self.engine.step, False
        self._permits = threading.Semaphore(steps)

    def allow(self, steps: int) -> None:
        self._permits.release(steps)

    def __enter__(self) -> "Brake":
        self.engine.step = self._held
        return self

    def __exit__(self, *_: object) -> None:
        self._free = True
        self.allow(1)
        del self.engine.step

    def _held(self) -> bool:
        stats = self.engine.stats
        if (stats.running or stats.waiting) and not self._free:
            assert self._permits.acquire(timeout=PATIENCE), "the test allowed no further step"
        return self._step()


@contextlib.contextmanager
def in_lockstep(server: Running) -> Iterator[None]:
    """Each step of the engine waits until the pieces of the one before are taken: a stream has an event a step.

    Else a busy event loop finds the pieces of several steps joined, or an error before the first of them.
    """
    service = server.service
    step = service.engine.step

    def paced() -> bool:
        # what the last step delivered is in front of this in the loop's queue
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), service.worker._loop).result(PATIENCE)
        wait_for(lambda: not any(running.job._pieces for running in list(service.running)))
        return step()

    service.engine.step = paced
    try:
        yield
    finally:
        del service.engine.step


class Command:
    """`aquila-pd serve` in a process of its own, forked from a warm one, with the fake engine."""

    def __init__(self, folder: Path, *arguments: str, **environment: str):
        words = ["-c", START.format(paths=IMPORTED), folder, "--port", "0", *arguments]
        self.process = warm().start(words, stdout=PIPE, stderr=PIPE, cwd=ROOT, env={**os.environ, **environment})
        self.line = self.process.stdout.readline().strip()
        self.url = self.line.split()[-1] if self.line else ""

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Its exit status and what it wrote to stderr, after a signal."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        status = self.process.wait(PATIENCE)
        return status, self.process.stderr.read()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            stream.close()


def chat_body(content: str = "hi", **more) -> dict:
    return {"messages": [{"role": "user", "content": content}], **more}


def metric(page: str, name: str) -> float:
    """The sum of a metric over its labels."""
    rows = [line for line in page.splitlines() if line.split("{")[0].split(" ")[0] == name]
    return sum(float(line.split()[-1]) for line in rows)


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.005)


def raw_request(port: int, path: str, body: dict | bytes, *, method: str = "POST", headers: str = "") -> socket.socket:
    """A request written by hand; the connection, for what comes back."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def sse(text: str) -> list:
    """The values of a stream's events, [DONE] as a text; every event framed exactly, or this fails."""
    *events, rest = text.split("\n\n")
    assert rest == "" and all(event.startswith("data: ") and "\n" not in event for event in events), text
    values = [event.removeprefix("data: ") for event in events]
    return [value if value == "[DONE]" else json.loads(value) for value in values]


def error_of(response, status: int = 400) -> dict:
    """The error of an answer, which has to have this status and OpenAI's four keys."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def spied(server, monkeypatch) -> list[tuple]:
    """(prompt, params) of everything that is given to the engine from now on."""
    seen = []
    add = server.service.engine.add

    def noted(prompt, params, listener):
        seen.append((list(prompt), params))
        return add(prompt, params, listener)

    monkeypatch.setattr(server.service.engine, "add", noted)
    return seen
