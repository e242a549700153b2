"""Access middleware: Host check, CORS preflight, API key, content type, body limit; all before a body is read.

A server on this machine is reachable from every page in this machine's browser. Two things keep those out: POST takes
application/json only, which a page of another origin may not send without being allowed to, and the Host header has
to be one of this server's own names, which a page that has renamed its server to 127.0.0.1 does not have.
"""

import asyncio
import hmac
import ipaddress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, stopping
from .middleware import header, respond
from .service import Service

OPEN_PATHS = ("/health", "/")  # GET only: for load balancers, and the page, which holds nothing
BODY_SECONDS = 60.0  # for the next part of a request's body
GENERATING = ("/v1/chat/completions", "/v1/completions", "/")
CORS_METHODS = "GET, POST"
CORS_HEADERS = "authorization, content-type"


class AccessMiddleware:
    """ASGI middleware that rejects unauthorised or malformed requests and limits the size and time of their bodies."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service, self._settings = app, service, service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_host(scope)
            if self._is_preflight(scope):
                await send({"type": "http.response.start", "status": 204, "headers": preflight_headers()})
                await send({"type": "http.response.body", "body": b""})
                return
            self._check_key(scope)
            self._check_open(scope)
            self._check_body(scope)
        except ApiError as error:
            scope["state"]["record"].outcome = error.code
            await respond(error, scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _check_host(self, scope: Scope) -> None:
        """Protection from DNS rebinding: the Host has to be a name of this server, unless an API key is required."""
        host = (header(scope, b"host") or "").lower()
        if self._settings.api_key is None and not is_own(without_port(host), self._settings.hosts):
            raise ApiError(
                403,
                f"This server is not called {host[:100]!r}. Use its address or localhost, or start it with "
                "--allow-host NAME or --api-key.",
                code="host_not_allowed",
            )

    def _is_preflight(self, scope: Scope) -> bool:
        asked = scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method") is not None
        return asked and header(scope, b"origin") in self._settings.cors_origins

    def _check_open(self, scope: Scope) -> None:
        if self._service.stopping and scope["path"] != "/health":
            raise stopping()
        if scope["method"] == "POST" and scope["path"] in GENERATING:
            self._service.require_room(1)  # before the body is read: a full server does not spend memory on refusals

    def _check_key(self, scope: Scope) -> None:
        key = self._settings.api_key
        if key is None or (scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN_PATHS):
            return
        scheme, _, given = (header(scope, b"authorization") or "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode("utf-8"))
        if scheme.lower() != "bearer" or not same:
            message = "Incorrect API key." if given else "No API key: send the header Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _check_body(self, scope: Scope) -> None:
        if scope["method"] != "POST":
            return
        kind = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415,
                f"The body has to be sent as Content-Type: application/json, not {kind[:100] or 'without a type'}.",
                code="unsupported_media_type",
            )
        length = header(scope, b"content-length") or ""
        if length.isdecimal() and (len(length) > 18 or int(length) > self._settings.max_body):
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than {self._settings.max_body:,} bytes, the most this server reads.",
            code="request_too_large",
        )

    def _limited(self, receive: Receive) -> Receive:
        """`receive` with a limit on the bytes of the body and on the time between its parts."""
        read, complete = 0, False

        async def limited() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()  # only that the client has gone can come now, at any time
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"Nothing more of the body came for {BODY_SECONDS:g} s.",
                    code="body_timeout",
                    headers={"connection": "close"},
                ) from None
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if read > self._settings.max_body:
                    raise self._too_large()
            return message

        return limited


def preflight_headers() -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-methods", CORS_METHODS.encode()),
        (b"access-control-allow-headers", CORS_HEADERS.encode()),
        (b"access-control-max-age", b"600"),
    ]


def without_port(host: str) -> str:
    """ "localhost:8000" -> "localhost", "[::1]:8000" -> "::1"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_own(name: str, hosts: tuple[str, ...]) -> bool:
    """Whether a Host is an address, localhost, or a name the server was given."""
    if name == "localhost" or name in hosts:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
