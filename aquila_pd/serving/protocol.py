"""Request schemas of every endpoint: strict pydantic models.

A parameter that is not honoured is refused by name. Some of those that OpenAI's clients send have a value that asks
for nothing (tools: [], response_format: {"type": "text"}); that value is accepted, and no other.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# More of these are not looked at one by one: a small body could otherwise ask for a huge list of what is wrong with it.
MOST_PARAMETERS = 100
MOST_STOPS = 16
LONGEST_STOP = 500  # characters; each token of an answer is compared with its beginnings
MOST_PROMPTS = 2048
MOST_MESSAGES = 4096
MOST_BIASES = 4096
MOST_LABELS = 16
INT64 = 2**63


class Strict(BaseModel):
    """No unknown parameters, no conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > MOST_PARAMETERS:
            raise wrong(f"{len(value):,} parameters; nothing here has so many")
        return value


def wrong(sentence: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{sentence}", {"sentence": sentence})


def only(*values: object, why: str) -> Any:
    """The type of a parameter that has to be absent, null, or one of these values, which ask for nothing."""

    def check(value: object) -> object:
        if value is None or any(type(value) is type(neutral) and value == neutral for neutral in values):
            return value
        raise PydanticCustomError("unsupported", "{why}", {"why": f"not supported: {why}"})

    return Annotated[Any, AfterValidator(check), Field(default=None, description=f"Not supported: {why}.")]


def joined_text(value: object) -> object:
    """The text of a message's content: a string, or a list of parts that are all text, joined."""
    if not isinstance(value, list):
        if value is None:
            raise wrong("null is no content; this server's messages have text")
        return value
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = f"of type {kind[:40]!r}" if isinstance(kind, str) else "without a type"
            raise wrong(f"part {i} is {shown}; this model reads text only")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise wrong(f'part {i} has to be {{"type": "text", "text": "..."}}')
    if not value:
        raise wrong("the list of parts is empty")
    return "".join(part["text"] for part in value)


def at_most(limit: int) -> BeforeValidator:
    """Refuses a longer list or object before its entries are looked at."""

    def check(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > limit:
            raise wrong(f"{len(value):,} entries; at most {limit:,}")
        return value

    return BeforeValidator(check)


def as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Content = Annotated[str, BeforeValidator(joined_text)]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]], at_most(MOST_STOPS), BeforeValidator(as_list)
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]

NO_TOOLS = "this server calls no tools"
NO_FORMAT = "answers are text; no grammar is enforced"
NO_SOUND = "this model reads and writes text"
NO_REASONING = "this model has no such setting"


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: only(False, why="streams are not padded") = None


class Asked(Strict):
    """Sampling and stop parameters that chat and text completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=2 * INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], at_most(MOST_BIASES)] | None = None
    # beyond OpenAI's
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: Annotated[list[TokenId], at_most(256)] | None = None
    # labels, without influence on the answer
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: Annotated[dict[str, str], at_most(MOST_LABELS)] | None = None
    # asked for nothing
    store: only(False, why="nothing is stored")
    service_tier: only("auto", "default", why="there is one tier")

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    # what an answer of OpenAI's looks like when it is sent back as history
    refusal: only(why="a refusal is sent as content")
    annotations: only([], why=NO_FORMAT)
    name: only(why="the model's template has no place for names")
    audio: only(why=NO_SOUND)
    tool_calls: only([], why=NO_TOOLS)
    function_call: only(why=NO_TOOLS)

    def plain(self) -> dict[str, str]:
        """As the chat templates want it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


Messages = Annotated[list[Message], Field(min_length=1), at_most(MOST_MESSAGES)]


class ChatRequest(Asked):
    """POST /v1/chat/completions"""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: only([], why=NO_TOOLS)
    tool_choice: only("none", "auto", why=NO_TOOLS)
    parallel_tool_calls: only(why=NO_TOOLS)
    functions: only([], why=NO_TOOLS)
    function_call: only("none", "auto", why=NO_TOOLS)
    response_format: only({"type": "text"}, why=NO_FORMAT)
    modalities: only(["text"], why=NO_SOUND)
    audio: only(why=NO_SOUND)
    prediction: only(why=NO_REASONING)
    reasoning_effort: only("none", why=NO_REASONING)
    verbosity: only("medium", why=NO_REASONING)
    web_search_options: only(why=NO_TOOLS)
    prompt_cache_retention: only(why="prompts are kept as long as their slot is free")


def checked_prompt(value: object) -> object:
    """A text, texts, token ids, or lists of token ids; as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong("a text, a list of texts, a list of token ids, or a list of such lists; not empty")
    if all(_is_id(item) for item in value):
        return [value]
    all_texts = all(isinstance(item, str) for item in value)
    if not all_texts and not all(isinstance(item, list) and all(map(_is_id, item)) for item in value):
        raise wrong("texts and token ids are mixed, or something is neither")
    if len(value) > MOST_PROMPTS:
        raise wrong(f"{len(value):,} prompts; at most {MOST_PROMPTS:,}")
    return value


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


class CompletionRequest(Asked):
    """POST /v1/completions"""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(checked_prompt)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: only(1, why="every answer that is made is given; ask for n")
    suffix: only("", why="this model continues texts")


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or messages as the model's template writes them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class SeedRequest(Strict):
    """POST /: the service of BAAI's own example, with the names and defaults of `predict`."""

    prompt: str
    history: Annotated[list[Annotated[list[str], Field(min_length=2, max_length=2)]], at_most(MOST_MESSAGES)] | None = (
        None
    )
    max_gen_len: Annotated[int, Field(ge=1, lt=2**31)] = 200
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.9
    topk: Annotated[int, Field(ge=0, lt=2**31)] = 15
    temperature: Annotated[float, Field(ge=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = 123
    sft: bool = True
