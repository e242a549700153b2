"""Request middleware: request id, access log, security and CORS headers, uncaught exceptions as JSON errors."""

import asyncio
import secrets

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..utils.errors import shown
from .errors import CLIENT_GONE, ApiError, ClientGone, internal
from .request_state import Record
from .service import Service
from .sse import Json

SECURITY = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",  # the page has its own
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
EXPOSED = "x-request-id, retry-after"


class RequestMiddleware:
    """The outermost ASGI middleware of the application."""

    def __init__(self, app: ASGIApp, service: Service, routes: frozenset[str]):
        self._app, self._service, self._routes = app, service, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(f"req-{secrets.token_hex(12)}")
        scope.setdefault("state", {})["record"] = record
        status = 0

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(scope, message, record)
            await send(message)

        try:
            await self._app(scope, receive, framed)
        except ClientGone:
            status = CLIENT_GONE
            self._service.abort(scope)
            await asyncio.sleep(0)  # uvicorn learns of it in the next turn of the loop, and then has no complaints
        except Exception as error:
            self._service.log.exception(record.request_id, error)
            record.outcome = "internal_error"
            if not status:
                await respond(internal(record.request_id), scope, receive, framed)
        finally:
            self._write(scope, status or CLIENT_GONE, record)

    def _add_headers(self, scope: Scope, message: Message, record: Record) -> None:
        headers = MutableHeaders(raw=message.setdefault("headers", []))
        headers["x-request-id"] = record.request_id
        for name, value in SECURITY.items():
            headers.setdefault(name, value)
        origins = self._service.settings.cors_origins
        if not origins:
            return
        headers.add_vary_header("origin")
        if (origin := header(scope, b"origin")) in origins:
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = EXPOSED
            headers["cross-origin-resource-policy"] = "cross-origin"

    def _write(self, scope: Scope, status: int, record: Record) -> None:
        path = scope["path"]
        route = "/v1/models/{model:path}" if path.startswith("/v1/models/") else path
        self._service.metrics.answered(route if route in self._routes else "other", status, record)
        words = [record.request_id, scope["method"], shown(path), str(status), f"{record.seconds() * 1000:.0f}ms"]
        if record.prompt_tokens:
            words.append(f"tokens={record.prompt_tokens}+{record.new_tokens}")
        if record.outcome:
            words.append(record.outcome)
        self._service.log.line(" ".join(words))


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a request header, the first when there are several."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def respond(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error as the whole answer."""
    response = Json(error.body(), error.status_code, headers=error.headers)
    await response(scope, receive, send)
