"""Per-request state: a running job as a context manager, ended early by disconnect, timeout or shutdown."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic

from starlette.types import Receive

from .choices import Piece
from .engine_worker import Job, Worker
from .errors import ApiError, ClientGone, Failure, timed_out


@dataclass
class Record:
    """Access-log and metrics record of one HTTP request."""

    request_id: str
    began: float = field(default_factory=monotonic)
    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token: float | None = None  # seconds after the beginning
    outcome: str = ""  # what ended it early, as a code

    def seconds(self) -> float:
        return monotonic() - self.began


class Running:
    """A submitted job as a context manager: on exit its sequences are cancelled, finished or not.

    A client's disconnect and the request timeout end it with an error of their own; so does `fail`, at shutdown.
    """

    def __init__(
        self, job: Job, worker: Worker, record: Record, *, receive: Receive, timeout: float, closed: Callable
    ) -> None:
        self.job, self.record = job, record
        self._worker, self._closed = worker, closed
        self._watch = asyncio.create_task(self._until_hung_up(receive))
        self._timer = asyncio.get_running_loop().call_later(
            max(timeout - record.seconds(), 0), self.fail, timed_out(timeout)
        )
        worker.submit(job)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Cancel the job, stop its timer and count its tokens. error: what ended it early, if anything did."""
        self._watch.cancel()
        self._timer.cancel()
        self._worker.cancel(self.job)
        self.record.prompt_tokens = sum(map(len, self.job.prompts))
        self.record.new_tokens = sum(len(sequence.tokens) for sequence in self.job.sequences)
        if isinstance(error, ApiError | ClientGone):
            self.note(error.code)
        self._closed(self)

    def note(self, outcome: str) -> None:
        """Remember, for the log, what ended the request early."""
        self.record.outcome = self.record.outcome or outcome

    def fail(self, error: Failure) -> None:
        """End it early with an error; its slots are free before the next step."""
        self.job.fail(error)
        self._worker.cancel(self.job)

    async def begun(self) -> None:
        """Wait for the first token or the error that came instead."""
        await self.job.begun()
        self.record.first_token = self.record.first_token or self.record.seconds()

    async def pieces(self) -> AsyncIterator[Piece]:
        await self.begun()
        async for piece in self.job.pieces():
            yield piece

    async def whole(self) -> list[Piece]:
        """All choices, each in one piece."""
        found: dict[int, Piece] = {}
        async for piece in self.pieces():
            if piece.choice in found:
                found[piece.choice].extend(piece)
            else:
                found[piece.choice] = piece
        return [found[choice] for choice in sorted(found)]

    def usage(self) -> dict:
        """OpenAI's usage object. A prompt counts once, however many answers it gets."""
        prompt = sum(map(len, self.job.prompts))
        answer = sum(len(sequence.tokens) for sequence in self.job.sequences)
        reused = sum(sequence.reused for sequence in self.job.sequences if sequence.index == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    async def _until_hung_up(self, receive: Receive) -> None:
        with suppress(asyncio.CancelledError):
            while (await receive())["type"] != "http.disconnect":
                pass
            self.fail(ClientGone())
