"""A stand-in for the server behind the chat page: it serves the page and answers as a test has scripted.

Every request is kept for the test to look at. An answer is a function of the HTTP handler; a
`Gate` between its pieces lets the test see the page while the answer is half there, without a wait by the clock.
"""

import json
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from aquila_pd.serving.page import read_page

MODEL = "AquilaChat2-tiny"
PATIENCE = 120  # seconds until a script that nobody goes on with gives up


@dataclass(frozen=True)
class Received:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: dict | None


class Gate:
    """A place in an answer where the server waits until the test says go on."""

    def __init__(self) -> None:
        self._opened = threading.Event()

    def open(self) -> None:
        self._opened.set()

    def wait(self) -> None:
        if not self._opened.wait(PATIENCE):
            raise TimeoutError("the test did not open the gate")


Answer = Callable[["Handler"], None]


def chunk(text: str = "", finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return event({"object": "chat.completion.chunk", "model": MODEL, "choices": [choice], "usage": None})


def event(data: object) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def stream(*pieces: str | bytes | Gate, finish: str = "stop", usage: tuple[int, int] = (12, 34)) -> Answer:
    """A whole answer: each text is one chunk, bytes go out as they are, a gate waits."""
    prompt, completion = usage
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    ends = [chunk(finish=finish), event({"choices": [], "usage": counts}), b"data: [DONE]\n\n"]

    def answer(handler: "Handler") -> None:
        handler.begin_stream()
        for piece in (*pieces, *ends):
            handler.send_piece(piece)
        handler.end_stream()

    return answer


def stream_then(last: bytes | None, *pieces: str | Gate) -> Answer:
    """Pieces, then `last` as the end of the stream; None: the connection breaks instead."""

    def answer(handler: "Handler") -> None:
        handler.begin_stream()
        for piece in pieces:
            handler.send_piece(piece)
        if last is None:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        handler.send_piece(last)
        handler.end_stream()

    return answer


def endless(word: str, heard: threading.Event, first: bytes = b"") -> Answer:
    """Words until the client hangs up, which sets `heard`; before them `first`, as it is."""

    def answer(handler: "Handler") -> None:
        handler.begin_stream()
        try:
            if first:
                handler.send_piece(first)
            for _ in range(PATIENCE * 50):
                handler.send_piece(word)
                threading.Event().wait(0.02)
        except OSError:
            heard.set()
            handler.close_connection = True

    return answer


def refuse(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    """An error as OpenAI's API words it; headers: retry_after="7"."""
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(handler: "Handler") -> None:
        handler.send_whole(status, "application/json", json.dumps(body).encode(), named)

    return answer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "PageServer"

    def do_GET(self) -> None:
        self.keep()
        if self.path == "/":
            self.send_whole(200, "text/html; charset=utf-8", self.server.page, self.server.page_headers)
        elif self.path == "/v1/models" and self.server.models is not None:
            self.server.models(self)
        elif self.path == "/v1/models":
            entry = {"id": MODEL, "object": "model", "owned_by": "aquila_pd", "max_model_len": 2048}
            self.send_whole(200, "application/json", json.dumps({"object": "list", "data": [entry]}).encode())
        else:
            self.send_whole(404, "text/plain", b"not here")

    def do_POST(self) -> None:
        self.keep()
        with suppress(ConnectionError):  # a page that is closed while it is answered
            self.server.answers.popleft()(self)

    def keep(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.received.append(Received(self.command, self.path, headers, body))

    def send_whole(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send_piece(self, piece: str | bytes | Gate) -> None:
        if isinstance(piece, Gate):
            piece.wait()
            return
        data = chunk(piece) if isinstance(piece, str) else piece
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        """Tests look at `received`."""


class PageServer(ThreadingHTTPServer):
    """Used as a context. A test fills `answers`, may replace `models`, and reads `received` and `asked`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.page, self.page_headers = read_page()  # with its Content-Security-Policy, as the real server sends it
        self.answers: deque[Answer] = deque()
        self.received: list[Received] = []
        self.models: Answer | None = None  # None: the usual list of one model
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "PageServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def asked(self) -> list[dict]:
        """The bodies of the requests for an answer, in order."""
        return [request.body for request in self.received if request.path == "/v1/chat/completions"]
