"""POST /: the small web service of the model's own examples, {prompt} -> {response, status, time}."""

import time

from starlette.requests import Request
from starlette.responses import Response

from ..generation import SamplingParams
from .api_errors import ApiError
from .protocol import SeedRequest
from .sampling import room
from .service import Service, Wanted
from .sse import Json


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
    if asked.sft:
        prompts = service.require_prompts()
        turns = [*(asked.history or ()), [asked.prompt, ""]]
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ][:-1]
        longest = service.engine.max_length - asked.max_gen_len
        messages, _ = await service.off_loop(prompts.fit, messages, longest)
        ids = await service.off_loop(prompts.encode, messages)
        stop, stop_ids = tuple(prompts.stop_strings), (*prompts.stop_ids, *service.stop_ids)
    else:
        ids, stop = await service.off_loop(service.ids_of, asked.prompt), ()
        stop_ids = service.stop_ids
    limit = service.engine.max_length
    params = SamplingParams(
        max_new_tokens=room(asked.max_gen_len, None, len(ids), limit, param="prompt"),
        temperature=asked.temperature,
        top_k=asked.topk,
        top_p=max(asked.top_p, 1e-9),
        seed=asked.seed,
        stop_ids=stop_ids,
    )
    return Wanted([ids], params, stop, chat=asked.sft)
