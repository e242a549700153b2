"""POST /: the protocol of BAAI's example web service, {prompt} -> {response, status, time}."""

import time

from starlette.requests import Request
from starlette.responses import Response

from ...chat.predict import messages_of
from ...generation import SamplingParams
from ..errors import ApiError, context_length, invalid
from ..protocol import SeedRequest
from ..sampling import room
from ..service import Service, Wanted
from ..sse import Json


async def answer(service: Service, asked: SeedRequest, request: Request) -> Response:
    """The response to one request. An error has these three keys too, beside OpenAI's `error`."""
    try:
        wanted = await plan(service, asked)
        with service.begin(request, wanted) as running:
            (piece,) = await running.whole()
    except ApiError as error:
        return Json({**said("", error.status_code), **error.body()}, error.status_code, headers=error.headers)
    return Json(said(piece.text, 200))


def said(response: str, status: int) -> dict:
    return {"response": response, "status": status, "time": time.strftime("%Y-%m-%d %H:%M:%S")}


async def plan(service: Service, asked: SeedRequest) -> Wanted:
    """sft: the prompt is a turn of a chat, else a text to be continued. History that is too long loses its oldest."""
    limit = service.engine.max_length
    if asked.max_gen_len >= limit:
        raise context_length(0, asked.max_gen_len, limit, param="max_gen_len")
    if asked.sft:
        prompts = service.require_prompts()
        messages = messages_of(asked.history or (), asked.prompt)
        messages, _ = await service.off_loop("prompt", prompts.fit, messages, limit - asked.max_gen_len)
        ids = await service.off_loop("prompt", prompts.encode, messages)
        stop, stop_ids = tuple(prompts.stop_strings), (*prompts.stop_ids, *service.stop_ids)
    else:
        if asked.history:
            raise invalid("`history` belongs to a chat: leave sft true, or put it into the prompt.", param="history")
        ids = await service.off_loop("prompt", service.ids_of, asked.prompt)
        stop, stop_ids = (), service.stop_ids
    if not ids:
        raise invalid("`prompt` is empty; there is no token to continue.", param="prompt")
    params = SamplingParams(
        max_new_tokens=room(asked.max_gen_len, None, len(ids), limit, param="prompt"),
        temperature=asked.temperature,
        top_k=asked.topk,
        top_p=max(asked.top_p, 1e-9),
        seed=asked.seed,
        stop_ids=stop_ids,
    )
    return Wanted([ids], params, stop, chat=asked.sft)
