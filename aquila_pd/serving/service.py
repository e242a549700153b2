"""Service: state shared by all endpoints: model, tokenizer, engine worker, metrics, admission limit."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from starlette.requests import Request
from starlette.types import Scope

from ..generation import Engine, SamplingParams
from ..runtime.versions import NAME, VERSION
from ..text.text_stream import TextStream
from ..utils.errors import AquilaError
from .choices import Choice
from .engine_worker import Job, Worker
from .errors import ApiError, engine_failed, invalid, overloaded, stopping
from .log import Log
from .metrics import Metrics
from .request_state import Running
from .sampling import at_most
from .settings import Settings
from .vocabulary import Offsets, Vocabulary

SHORTEST_RETRY, LONGEST_RETRY = 1, 60  # seconds, of Retry-After
LAST_WORDS = 5.0  # seconds for the last events of streams, when the server stops


class Model(Protocol):
    """The part of text.loading.Loaded that is used here."""

    tokenizer: object
    engine: Engine
    prompts: object | None
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """A validated request in the engine's terms."""

    prompts: list[list[int]]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    chat: bool = False  # white space at the beginning of an answer is left out; else it continues the prompt's text


class Service:
    """One model behind the endpoints."""

    def __init__(self, model: Model, settings: Settings, log: Log, prepare: Callable[[], None] = lambda: None):
        self.tokenizer, self.prompts, self.engine = model.tokenizer, model.prompts, model.engine
        self.settings, self.log = settings, log
        self.vocabulary = Vocabulary(model.tokenizer)
        self.metrics = Metrics(self)
        self.worker = Worker(model.engine, on_error=partial(log.exception, "the engine"), prepare=prepare)
        self.stop_ids = tuple(model.stop_ids)  # of a text that is continued without a template
        self.created = int(time.time())
        self.fingerprint = f"{NAME}-{VERSION}"
        self.running: set[Running] = set()
        self.stopping = self.hurry = False  # hurry: no time is given to running requests any more
        self.abort: Callable[[Scope], None] = lambda scope: None  # set by the server: drops a request's connection
        # one thread: the tokenizer is not for several, and a long text must not stop the event loop
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    # -------------------------------------------------------------------------------------------- text and ids

    async def off_loop(self, param: str, function: Callable, *arguments: object):
        """Run a tokenizer or template function in its thread; its errors become a 400 that names `param`."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._tokenizing, function, *arguments)
        except AquilaError as error:
            raise invalid(str(error), param=param) from error

    def ids_of(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a raw text; special tokens spelled in it are special tokens."""
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def require_model(self, name: str | None) -> None:
        """Raise ApiError when a request is for another model."""
        if name is not None and name != self.settings.name:
            raise ApiError(
                404,
                f"This server has no model {name[:100]!r}; it serves {self.settings.name!r}.",
                code="model_not_found",
                param="model",
            )

    def require_prompts(self):
        if self.prompts is None:
            raise invalid(
                "This model's folder has no chat template, so there is no chat. Start the server with --template NAME, "
                "or use /v1/completions.",
                code="no_chat_template",
            )
        return self.prompts

    # ------------------------------------------------------------------------------------------------- running

    def begin(self, request: Request, wanted: Wanted) -> Running:
        """Submit work to the engine. Raises ApiError when the queue is full, the server stops or the engine is dead."""
        count = len(wanted.prompts) * wanted.params.n
        at_most(count, self.settings.most_sequences)
        if self.stopping:
            raise stopping()
        if not self.worker.alive:
            raise engine_failed()
        self.require_room(count)
        running = Running(
            Job(wanted.prompts, wanted.params, partial(self._choice, wanted)),
            self.worker,
            request.state.record,
            receive=request.receive,
            timeout=self.settings.request_timeout,
            closed=self._closed,
        )
        self.running.add(running)
        return running

    def require_room(self, count: int) -> None:
        """Admission control: raise ApiError 429 when `count` more sequences exceed slots and queue."""
        taken = sum(running.job.count for running in self.running)
        if taken + count > self.settings.most_sequences:
            self.metrics.rejected.inc()
            raise overloaded(taken, self.retry_after(taken))

    def retry_after(self, taken: int) -> int:
        """Retry-After in seconds, estimated from the recent mean time of generations."""
        seconds = self.metrics.mean_seconds() * taken / self.settings.slots / 2
        return round(min(max(seconds, SHORTEST_RETRY), LONGEST_RETRY))

    def _choice(self, wanted: Wanted, number: int) -> Choice:
        text = TextStream(self.tokenizer, wanted.stop, strip_start=wanted.chat, follows=not wanted.chat)
        asked = wanted.params.logprobs is not None
        offsets = Offsets(self.vocabulary, strip_start=wanted.chat) if asked else None
        return Choice(number, text, offsets)

    def _closed(self, running: Running) -> None:
        self.running.discard(running)
        self.metrics.finished(running.record)

    # ------------------------------------------------------------------------------------------------ the end

    async def stop(self, grace: float) -> None:
        """Take no new requests, give the running ones `grace` seconds, then end them with an error of their own."""
        self.stopping = True
        end = time.monotonic() + grace
        while self.running and time.monotonic() < end and not self.hurry:
            await asyncio.sleep(0.02)
        for running in list(self.running):
            running.fail(stopping())
        last_words = time.monotonic() + LAST_WORDS
        while self.running and time.monotonic() < last_words:
            await asyncio.sleep(0.02)
