"""POST /v1/completions: text completions without a chat template; with echo, log-probabilities of the prompt."""

import secrets
import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from ..choices import Piece, Token
from ..errors import invalid
from ..protocol import CompletionRequest
from ..request_state import Running
from ..sampling import DEFAULT_MAX_TOKENS, at_most, require_stream, room, sampling_params
from ..service import Service, Wanted
from ..sse import answered
from ..vocabulary import Offsets, legacy_logprobs


async def answer(service: Service, asked: CompletionRequest, request: Request) -> Response:
    """The response to one request, whole or as a stream."""
    wanted, echoes = await plan(service, asked)
    running = service.begin(request, wanted)
    reply = Reply(service, asked, running, echoes)
    return await answered(reply, running, stream=bool(asked.stream), stall_timeout=service.settings.stall_timeout)


async def plan(service: Service, asked: CompletionRequest) -> tuple[Wanted, list[str]]:
    """Validate the request and map it to the engine's terms; the texts to echo. Raises ApiError."""
    service.require_model(asked.model)
    require_stream(asked)
    at_most(len(asked.prompt) * (asked.n or 1), service.settings.most_sequences)
    if asked.max_tokens == 0 and not asked.echo:
        raise invalid("`max_tokens`: 0 asks for nothing, unless echo is true.", param="max_tokens")
    prompts = [await service.off_loop("prompt", service.ids_of, p) if isinstance(p, str) else p for p in asked.prompt]
    for i, ids in enumerate(prompts):
        if not ids:
            raise invalid(f"`prompt`: prompt {i} is empty; there is no token to continue.", param="prompt")
        unknown = [token for token in ids if token >= service.engine.vocab_size]
        if unknown:
            raise invalid(f"`prompt`: the model has no token {unknown[0]}.", param="prompt")
    longest = max(map(len, prompts))
    limit = service.engine.max_length
    scored = bool(asked.echo) and asked.logprobs is not None
    # to echo without log-probabilities and without an answer is no work for the engine, but one way is enough
    params = sampling_params(
        asked,
        stop_ids=service.stop_ids,
        max_new_tokens=room(asked.max_tokens, DEFAULT_MAX_TOKENS, longest, limit, param="prompt"),
        vocab_size=service.engine.vocab_size,
        logprobs=asked.logprobs,
        prompt_logprobs=scored or asked.max_tokens == 0,
    )
    echoes = []
    if asked.echo:
        echoes = [
            p if isinstance(p, str) else await service.off_loop("prompt", service.text_of, p) for p in asked.prompt
        ]
    return Wanted(prompts, params, tuple(asked.stop or ())), echoes


class Reply:
    """The JSON of one request's answers. echoes: the prompts' texts where they are repeated, else empty."""

    def __init__(self, service: Service, asked: CompletionRequest, running: Running, echoes: list[str]):
        self._service, self._asked, self._running, self._echoes = service, asked, running, echoes
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, pieces: list[Piece]) -> dict:
        choices = [
            self._choice(piece.choice, self._echo(piece.choice) + piece.text, self._all_tokens(piece), piece)
            for piece in pieces
        ]
        return {**self._head(), "choices": choices, "usage": self._running.usage()}

    async def chunks(self) -> AsyncIterator[dict]:
        """What comes, the repeated prompt with the first piece of each choice; finish_reason in an empty last chunk."""
        begun: set[int] = set()
        async for piece in self._running.pieces():
            first = piece.choice not in begun
            begun.add(piece.choice)
            text = (self._echo(piece.choice) if first else "") + piece.text
            tokens = self._all_tokens(piece) if first else self._shifted(piece)
            if text or tokens:
                yield self._chunk(self._choice(piece.choice, text, tokens))
            if piece.finish_reason is not None:
                yield self._chunk(self._choice(piece.choice, "", [], piece))
        if self._asked.wants_usage:
            yield {**self._head(), "choices": [], "usage": self._running.usage()}

    def _chunk(self, choice: dict) -> dict:
        return {**self._head(), "choices": [choice], **({"usage": None} if self._asked.wants_usage else {})}

    def _head(self) -> dict:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.settings.name,
            "system_fingerprint": self._service.fingerprint,
        }

    def _choice(self, number: int, text: str, tokens: list[tuple], ended: Piece | None = None) -> dict:
        wants = self._asked.logprobs is not None and (tokens or text)
        return {
            "text": text,
            "index": number,
            "logprobs": legacy_logprobs(tokens, self._asked.logprobs, self._service.vocabulary) if wants else None,
            "finish_reason": ended.finish_reason if ended else None,
        }

    def _echo(self, choice: int) -> str:
        return self._echoes[choice // self._running.job.params.n] if self._echoes else ""

    def _all_tokens(self, piece: Piece) -> list[tuple]:
        """The prompt's tokens where they are repeated, then the piece's."""
        sequence = self._running.job.sequences[piece.choice]
        if not self._echoes or not sequence.prompt_logprobs:
            return self._shifted(piece)
        offsets = Offsets(self._service.vocabulary, special=True)
        prompt = [
            (token, found, offsets.push(token))
            for token, found in zip(sequence.prompt, sequence.prompt_logprobs, strict=True)
        ]
        return prompt + self._shifted(piece)

    def _shifted(self, piece: Piece) -> list[tuple]:
        """(id, log-probability, offset) of a piece's tokens; behind a repeated prompt offsets count from its start."""
        before = len(self._echo(piece.choice))

        def placed(token: Token) -> tuple:
            return token.id, token.logprob, before + token.offset

        return [placed(token) for token in piece.tokens]
