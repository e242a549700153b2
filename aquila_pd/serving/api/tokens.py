"""POST /tokenize and /detokenize, GET /tokenizer_info: tokenizer endpoints in the format of vLLM and lm_eval."""

from ..errors import invalid
from ..protocol import DetokenizeRequest, TokenizeRequest
from ..service import Service

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


async def tokenize(service: Service, asked: TokenizeRequest) -> dict:
    """Ids of a text, or of messages with the answer's beginning."""
    service.require_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise invalid("Send either `prompt` or `messages`.", param="prompt")
    if asked.messages is not None:
        messages = [message.plain() for message in asked.messages]
        ids = await service.off_loop("messages", service.require_prompts().encode, messages)
    else:
        special = asked.add_special_tokens is not False
        ids = await service.off_loop("prompt", lambda: service.ids_of(asked.prompt, add_special_tokens=special))
    found = {"count": len(ids), "max_model_len": service.engine.max_length, "tokens": ids}
    if asked.return_token_strs:
        found["token_strs"] = [service.vocabulary.text_of(i) for i in ids]
    return found


async def detokenize(service: Service, asked: DetokenizeRequest) -> dict:
    """The text of ids, special tokens included."""
    service.require_model(asked.model)
    return {"prompt": await service.off_loop("tokens", service.text_of, asked.tokens)}


def tokenizer_info(service: Service) -> dict:
    """The special tokens by name, and the chat template's Jinja text where the tokenizer has one."""
    template = service.tokenizer.init_kwargs.get("chat_template")
    names = {name: service.tokenizer.special_tokens_map.get(name) for name in NAMES}
    return {**names, "chat_template": template if isinstance(template, str) else None}
