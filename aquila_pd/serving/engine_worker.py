"""Engine worker: the thread that owns the engine; a command queue in, deltas to the asyncio event loop out.

Only this thread touches the engine. The deltas of one step for all requests cross to the event loop in one call, so
neither waits for the other. An exception out of a step ends the requests that were running, each with an error of its
own; the engine is reset and the next request runs.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from ..generation import Engine, NonFiniteLogits, PromptTooLong, SamplingParams, Sequence, TokenEvent
from ..generation.sequence import ERROR
from ..utils.errors import GenerationError
from .choices import Choice, MakeChoice, Piece
from .errors import ApiError, Failure, context_length, engine_failed, invalid, nonfinite

UNHEALTHY_AFTER = 3  # failed steps with no good one between them
STUCK_SECONDS = 300.0  # a single step never takes so long


class Job:
    """The work of one request: prompts, each with params.n choices, numbered through both.

    sequences: the engine's, once it has them; to be read, not written, outside its thread.
    """

    def __init__(self, prompts: list[list[int]], params: SamplingParams, make_choice: MakeChoice):
        self.prompts, self.params, self.make_choice = prompts, params, make_choice
        self.sequences: list[Sequence] = []
        self.ended = False  # for the engine's thread: nothing more is to come of it
        self._open = set(range(len(prompts) * params.n))
        self._pieces: dict[int, Piece] = {}  # not yet taken; a slow reader finds them joined, never a long queue
        self._failure: Failure | None = None
        self._wake = asyncio.Event()

    @property
    def count(self) -> int:
        return len(self.prompts) * self.params.n

    def deliver(self, piece: Piece) -> None:
        """Event loop: queue a delta, merged into one of the same choice that is not taken yet."""
        if piece.choice in self._pieces:
            self._pieces[piece.choice].extend(piece)
        else:
            self._pieces[piece.choice] = piece
        if piece.finish_reason is not None:
            self._open.discard(piece.choice)
        self._wake.set()

    def fail(self, error: Failure) -> None:
        """Event loop: the reader of the pieces gets this error, the first of several."""
        self._failure = self._failure or error
        self._wake.set()

    async def begun(self) -> None:
        """Wait for the first delta; raises the error that came instead."""
        await self._wake.wait()
        if self._failure is not None:
            raise self._failure

    async def pieces(self) -> AsyncIterator[Piece]:
        """Every piece, until all choices have ended; raises the error that ended them early."""
        more = True
        while more:
            await self.begun()
            self._wake.clear()
            pieces, self._pieces = self._pieces, {}
            more = bool(self._open)
            for choice in sorted(pieces):
                yield pieces[choice]


class Worker:
    """The thread that runs an engine's step loop.

    on_error: called in that thread with an exception out of the engine, for the log. prepare: called in it first.
    """

    def __init__(
        self,
        engine: Engine,
        on_error: Callable[[BaseException], None],
        prepare: Callable[[], None] = lambda: None,
    ):
        self.engine = engine
        self.errors = 0  # exceptions out of the engine, in all
        self._on_error, self._prepare = on_error, prepare
        self._in_a_row = 0
        self._step_began: float | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: set[Job] = set()
        self._outbox: list[tuple[Callable, object]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    # ------------------------------------------------------------------------------------ from the event loop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._commands.put(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """Stop computing for a job; its slots are free before the next step. Nothing more is delivered."""
        self._commands.put(lambda: self._end(job))

    def stop(self) -> None:
        """End the thread after the step it is in."""

        def leave() -> None:
            self._stopping = True

        self._commands.put(leave)

    async def stopped(self, timeout: float) -> bool:
        """Wait for the thread's end; False when it is still in a step after `timeout` seconds."""
        await asyncio.to_thread(self._thread.join, timeout)
        return not self.alive

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def trouble(self) -> str | None:
        """Why the health check fails, in a sentence; None when the worker is healthy."""
        if not self.alive:
            return "The engine's thread is not running."
        if self._in_a_row >= UNHEALTHY_AFTER:
            return f"The engine failed {self._in_a_row} times in a row."
        began = self._step_began
        if began is not None and time.monotonic() - began > STUCK_SECONDS:
            return f"The engine has been in one step for {time.monotonic() - began:.0f} s."
        return None

    # -------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            self._prepare()
            busy = False
            while not self._stopping:
                self._run_commands(wait=not busy)
                busy = not self._stopping and self._step()
                self._flush()
        except Exception as error:  # not out of a step: our own mistake, after which the engine cannot be trusted
            self._on_error(error)
        finally:
            for job in list(self._jobs):
                self._fail(job, engine_failed())
            self._flush()

    def _run_commands(self, *, wait: bool) -> None:
        """Run the commands queued since the last step; when idle, block until one comes."""
        with suppress(queue.Empty):
            self._commands.get(block=wait)()
            while True:
                self._commands.get_nowait()()

    def _step(self) -> bool:
        self._step_began = time.monotonic()
        try:
            busy = self.engine.step()
        except Exception as error:
            self._recover(error)
            return False
        finally:
            self._step_began = None
        if busy:
            self._in_a_row = 0
        for job in [job for job in self._jobs if job.ended]:
            self._end(job)
        return busy

    def _recover(self, error: Exception) -> None:
        """After an exception out of a step: every running request ends with an error, and the engine starts anew."""
        self.errors += 1
        self._in_a_row += 1
        self._on_error(error)
        for job in self._jobs:
            self._fail(job, engine_failed())
        self._jobs.clear()
        try:
            self.engine.reset(error)
        except Exception as second:
            self._on_error(second)

    def _add(self, job: Job) -> None:
        self._jobs.add(job)
        try:
            for i, prompt in enumerate(job.prompts):
                choices = [job.make_choice(i * job.params.n + j) for j in range(job.params.n)]
                job.sequences += self.engine.add(prompt, job.params, self._listener(job, choices))
        except Exception as error:
            self._fail(job, self._api_error(error, job))
            self._end(job)

    def _listener(self, job: Job, choices: list[Choice]) -> Callable[[TokenEvent], bool]:
        def listen(event: TokenEvent) -> bool:
            if job.ended:
                return True
            if event.finish_reason == ERROR:
                self._fail(job, self._api_error(event.sequence.error, job))
                return True
            choice = choices[event.sequence.index]
            try:
                piece = choice.take(event)
            except Exception as error:
                self._fail(job, self._api_error(error, job))
                return True
            if not piece.empty:
                self._outbox.append((job.deliver, piece))
            return choice.done

        return listen

    def _end(self, job: Job) -> None:
        """Cancel the sequences of a job that still run."""
        job.ended = True
        for sequence in job.sequences:
            self.engine.cancel(sequence)
        self._jobs.discard(job)

    def _fail(self, job: Job, error: ApiError) -> None:
        """Send an error to a job's reader; its sequences are cancelled after the step."""
        if not job.ended:
            job.ended = True
            self._outbox.append((job.fail, error))

    def _api_error(self, error: BaseException | None, job: Job) -> ApiError:
        """Map an exception to the client's error; internal errors go to the log too."""
        if isinstance(error, NonFiniteLogits):
            return nonfinite(str(error))
        if isinstance(error, PromptTooLong):
            longest = max(map(len, job.prompts))
            return context_length(longest, job.params.max_new_tokens, self.engine.max_length, param="prompt")
        if isinstance(error, GenerationError):
            return invalid(str(error))
        self.errors += 1
        self._on_error(error or RuntimeError("A sequence ended with an error that was not told."))
        return engine_failed()

    def _flush(self) -> None:
        """Deliver the outbox to the event loop in one call."""
        if self._outbox:
            batch, self._outbox = self._outbox, []
            with suppress(RuntimeError):  # the event loop has closed, and with it every request
                self._loop.call_soon_threadsafe(_hand_out, batch)


def _hand_out(batch: list[tuple[Callable, object]]) -> None:
    for receiver, what in batch:
        receiver(what)
