"""Server-sent events (SSE) in OpenAI's framing: `data: {...}`, an empty line, `data: [DONE]` at the end.

A client that reads nothing for a while is disconnected; a disconnect ends its request at once.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Protocol

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .choices import Piece
from .errors import ApiError, ClientGone, internal
from .request_state import Running

DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the second: nginx is not to collect the events


def dumps(value: object) -> bytes:
    """Compact UTF-8 JSON. NaN and infinity are a ValueError: JSON has neither."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")


class Reply(Protocol):
    """Response builder of an endpoint: deltas to JSON, whole or chunk by chunk."""

    def whole(self, pieces: list[Piece]) -> dict: ...

    def chunks(self) -> AsyncIterator[dict]: ...


class Json(JSONResponse):
    """JSON response without NaN and infinity."""

    def render(self, content: object) -> bytes:
        return dumps(content)


async def answered(reply: Reply, running: Running, *, stream: bool, stall_timeout: float) -> Response:
    """The response to a running request, whole or as a stream. An error before the first token is no stream yet."""
    if not stream:
        with running:
            pieces = await running.whole()
            # log-probabilities of long texts are megabytes of JSON; other requests' events do not wait for them
            return await asyncio.to_thread(lambda: Json(reply.whole(pieces)))
    try:
        await running.begun()
    except BaseException as error:
        running.close(error)
        raise
    return EventStream(reply.chunks(), running, stall_timeout=stall_timeout)


def event(value: dict) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"


class EventStream(StreamingResponse):
    """SSE response of a running request; the request ends with the stream, however that ends.

    An error on the way is an event of its own, then comes the end like any other: clients see that it is complete.
    """

    def __init__(self, chunks: AsyncIterator[dict], running: Running, *, stall_timeout: float):
        super().__init__(chunks, media_type="text/event-stream", headers=HEADERS)
        self._running, self._stall_timeout = running, stall_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def say(body: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._stall_timeout):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        with self._running:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                failure = await self._say_chunks(say)
                await say(DONE)
                await say(b"", more=False)
            except TimeoutError:
                self._running.note("reader_stalled")
                raise ClientGone from None
        if failure is not None:
            raise failure

    async def _say_chunks(self, say) -> Exception | None:
        """All chunks, or an error as the last one; a mistake of our own is returned, for the log."""
        try:
            async for chunk in self.body_iterator:
                await say(event(chunk))
        except (ClientGone, TimeoutError):
            raise
        except Exception as error:
            told = error if isinstance(error, ApiError) else internal(self._running.record.request_id)
            self._running.note(told.code)
            await say(event(told.body()))
            return None if told is error else error
        return None
