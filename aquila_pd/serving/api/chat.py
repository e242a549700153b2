"""POST /v1/chat/completions: chat completions, whole or as SSE chunks."""

import secrets
import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from ..choices import Piece, Token
from ..errors import invalid
from ..protocol import ChatRequest
from ..request_state import Running
from ..sampling import require_stream, room, sampling_params
from ..service import Service, Wanted
from ..sse import answered
from ..vocabulary import chat_logprob


async def answer(service: Service, asked: ChatRequest, request: Request) -> Response:
    """The response to one request, whole or as a stream."""
    wanted = await plan(service, asked)
    running = service.begin(request, wanted)
    reply = Reply(service, asked, running)
    return await answered(reply, running, stream=bool(asked.stream), stall_timeout=service.settings.stall_timeout)


async def plan(service: Service, asked: ChatRequest) -> Wanted:
    """Validate the request and map it to the engine's terms. Raises ApiError."""
    service.require_model(asked.model)
    prompts = service.require_prompts()
    require_stream(asked)
    if asked.top_logprobs and not asked.logprobs:
        raise invalid("`top_logprobs` needs logprobs to be true.", param="top_logprobs")
    if asked.max_completion_tokens is not None and asked.max_tokens is not None:
        raise invalid("`max_tokens` is the old name of max_completion_tokens: send one of them.", param="max_tokens")
    if asked.max_tokens == 0:
        raise invalid("`max_tokens`: an answer has at least 1 token.", param="max_tokens")
    messages = [message.plain() for message in asked.messages]
    ids = await service.off_loop("messages", prompts.encode, messages)
    limit = asked.max_completion_tokens or asked.max_tokens
    params = sampling_params(
        asked,
        stop_ids=(*prompts.stop_ids, *service.stop_ids),
        max_new_tokens=room(limit, None, len(ids), service.engine.max_length, param="messages"),
        vocab_size=service.engine.vocab_size,
        logprobs=asked.top_logprobs or 0 if asked.logprobs else None,
    )
    return Wanted([ids], params, (*prompts.stop_strings, *(asked.stop or ())), chat=True)


class Reply:
    """The JSON of one request's answers."""

    def __init__(self, service: Service, asked: ChatRequest, running: Running):
        self._service, self._asked, self._running = service, asked, running
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, pieces: list[Piece]) -> dict:
        choices = [
            {
                "index": piece.choice,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece.tokens),
                "finish_reason": piece.finish_reason,
            }
            for piece in pieces
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._running.usage()}

    async def chunks(self) -> AsyncIterator[dict]:
        """The role of every choice, then what comes, each choice's finish_reason apart and last; usage if asked."""
        for choice in range(self._running.job.count):
            yield self._chunk(choice, {"role": "assistant", "content": "", "refusal": None})
        async for piece in self._running.pieces():
            if piece.text or piece.tokens:
                yield self._chunk(piece.choice, {"content": piece.text}, piece.tokens)
            if piece.finish_reason is not None:
                yield self._chunk(piece.choice, {}, finish_reason=piece.finish_reason)
        if self._asked.wants_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._running.usage()}

    def _chunk(self, choice: int, delta: dict, tokens: list[Token] = (), finish_reason: str | None = None) -> dict:
        logprobs = self._logprobs(tokens) if tokens else None
        part = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._asked.wants_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [part], **usage}

    def _head(self, kind: str) -> dict:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._service.settings.name,
            "system_fingerprint": self._service.fingerprint,
        }

    def _logprobs(self, tokens: list[Token]) -> dict | None:
        if not self._asked.logprobs:
            return None
        top = self._asked.top_logprobs or 0
        content = [chat_logprob(token.logprob, top, self._service.vocabulary) for token in tokens]
        return {"content": content, "refusal": None}
