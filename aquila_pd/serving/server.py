"""uvicorn server with a readiness line and graceful shutdown: running streams finish before it exits."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI
from starlette.types import Scope

from ..utils.errors import AquilaError
from .service import Service

WORKER_SECONDS = 30.0  # for the step the engine is in, when the server stops
CONNECTION_SECONDS = 5  # for answers that are written, until connections are cut
MOST_CONNECTIONS = 512  # open files are often limited to 1024


class ServerError(AquilaError):
    """The server cannot be reached at the address it was given."""


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises ServerError when it is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ServerError(f"Cannot listen on {host}, port {port}: {error.strerror}. Name another --port.") from error
    return bound


class Server(uvicorn.Server):
    """Serves one application until SIGTERM or SIGINT; a second signal ends running requests at once."""

    def __init__(self, app: FastAPI, service: Service, say: Callable[[str], None]):
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=CONNECTION_SECONDS,
        )
        super().__init__(config)
        self._service, self._say = service, say
        self._leaving: asyncio.Task | None = None
        service.abort = self._abort

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.worker.start()
        if threading.current_thread() is threading.main_thread():  # no other thread is told of signals
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.leave)
        try:
            await super().startup(sockets)
        except OSError as error:  # another server was faster since the socket was bound
            raise ServerError(f"Cannot listen: {error.strerror}. Name another --port.") from error
        host, port = sockets[0].getsockname()[:2]
        self._say(f"Serving {self._service.settings.name} at http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._service.worker.stop()
        if not await self._service.worker.stopped(WORKER_SECONDS):
            self._service.log.line("The engine is still in a step; it is left behind.")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: uvicorn would die of them again once everything is finished."""
        yield

    def _abort(self, scope: Scope) -> None:
        """Drop a request's connection with what is still to be written: its client takes nothing."""
        for connection in list(self.server_state.connections):
            if connection.scope is scope:
                connection.transport.abort()

    def leave(self) -> None:
        """Graceful shutdown: refuse new requests, finish running ones; a second call ends those too."""
        if self._leaving is not None:
            self._service.hurry = True
            return
        self._service.log.line("Stopping: running requests are finished, new ones refused.")
        self._leaving = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        await self._service.stop(self._service.settings.shutdown_grace)
        self.should_exit = True


class UvicornLog(logging.Handler):
    """logging.Handler that writes uvicorn's warnings to the server's log."""

    def __init__(self, service: Service):
        super().__init__(logging.WARNING)
        self._service = service

    def emit(self, record: logging.LogRecord) -> None:
        self._service.log.line(f"uvicorn: {record.getMessage()}")


def serve(app: FastAPI, service: Service, bound: socket.socket, say: Callable[[str], None]) -> None:
    """Serve until a signal stops it."""
    logger = logging.getLogger("uvicorn.error")
    handler = UvicornLog(service)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        Server(app, service, say).run(sockets=[bound])
    finally:
        logger.removeHandler(handler)
        service.log.close()
