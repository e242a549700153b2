"""model.predict(): one chat turn or text continuation with the signature of BAAI's predict; the caller owns history."""

import logging
from collections.abc import Iterable, Mapping

from ..generation import Engine, SamplingParams
from ..text.answer import Answer, raise_error, run
from ..text.prompts import ChatPrompts
from ..tokenization.chat_templates import TEMPLATES, template_by_name
from ..utils.errors import ChatError, ConfigError, GenerationError, shown_value

log = logging.getLogger("aquila_pd")

ENGINE = "_predict_engine"  # the entry of a model's __dict__ that holds (fingerprint, Engine)
MORE = ("order", "min_p", "min_new_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
PUBLISHED = (  # chat models, for the message about a name that is not known
    "AquilaChat-7B",
    "AquilaChat2-7B",
    "AquilaChat2-7B-16K",
    "AquilaChat2-34B",
    "AquilaChat2-34B-16K",
    "AquilaChat2-70B-Expr",
    "Ziya-LLaMA-13B",
    "Ziya2-13B-Chat",
)


def predict(
    model,
    text: str,
    tokenizer=None,
    max_gen_len: int = 200,
    top_p: float = 0.9,
    seed: int | None = 123,
    topk: int = 15,
    temperature: float = 1.0,
    sft: bool = True,
    convo_template: str = "",
    device: object = None,
    model_name: str = "AquilaChat2-7B",
    history: list | None = None,
    **kwargs,
) -> str:
    """The model's answer to a text: without special tokens, without white space in front.

    Args:
        model: an AquilaForCausalLM.
        text: what the user says; with sft=False, a text to continue.
        tokenizer: the model's AquilaTokenizer.
        max_gen_len: at most this many tokens of answer.
        top_p, topk, temperature: applied as everywhere else, temperature first, then topk, then top_p; order="aquila"
            asks for upstream's order: top_p, topk, temperature. temperature=0 takes the likeliest token each time,
            topk=0 keeps all.
        seed: the same seed gives the same answer; None draws one from the system.
        sft: True for a turn in a chat template; False continues the text as it is.
        convo_template: a chat template's name. "" takes the tokenizer's own, which the converter records, and only
            where it has none that of model_name.
        device: None, or where the model is.
        model_name: a published chat model.
        history: earlier turns, oldest first: (user, answer) pairs, or messages {"role": ..., "content": ...}, the
            first of which may be the system's. The list is the caller's. predict puts the new turn at its end, as a
            pair where the list is empty or ends with one, else as two messages; nothing else in it is changed, and
            nothing at all when an error is raised. When it is too long for the model, the oldest turns are left out
            of what the model reads, each whole, and the log says how many; the list stays complete.
        kwargs: order, min_p, min_new_tokens, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, as
            SamplingParams has them.

    The answer ends at the template's stop strings and at no others. The model keeps the keys and values of the last
    conversation, so that the next turn computes new tokens only: 2 * layers * key/value heads * head size numbers a
    token. They are dropped when weights have changed, and freed by `del model.__dict__["_predict_engine"]`.

    Raises ConfigError for an unknown template or model_name, ChatError for a history that cannot be written and a text
    that does not fit, GenerationError for parameters without meaning and for NaN or infinite logits.
    """
    _check(model, tokenizer, device, kwargs)
    engine = engine_of(model)
    sampling = dict(max_new_tokens=max_gen_len, temperature=temperature, top_k=topk or 0, top_p=top_p, seed=seed)
    if not sft:
        if history:
            raise ChatError("A history belongs to a chat: use sft=True, or put it into the text.")
        ids = tokenizer.encode(text)["input_ids"]
        params = SamplingParams(**sampling, **kwargs, stop_ids=_eos(tokenizer))
        return _answer(model, engine, ids, params, Answer(tokenizer, follows=True))
    prompts = ChatPrompts(tokenizer, _template_name(tokenizer, convo_template, model_name))
    params = SamplingParams(**sampling, **kwargs, stop_ids=prompts.stop_ids)
    ids = _fitted(prompts, messages_of(history or [], text), engine.max_length, max_gen_len)
    answer = _answer(model, engine, ids, params, Answer(tokenizer, stop=prompts.stop_strings, strip_start=True))
    if history is not None:
        append_turn(history, text, answer)
    return answer


def _check(model, tokenizer, device: object, more: Mapping) -> None:
    """Raise GenerationError for arguments that cannot be followed."""
    if not hasattr(tokenizer, "backend"):
        raise GenerationError(
            f"predict() needs the model's AquilaTokenizer, not {shown_value(tokenizer)}.\n"
            "Pass tokenizer=AquilaTokenizer.from_pretrained(FOLDER)."
        )
    unknown = sorted(more.keys() - set(MORE))
    if unknown:
        raise GenerationError(
            f"predict() knows no {', '.join(unknown)}. Beside the arguments of its signature: {', '.join(MORE)}."
        )
    where = "gpu" if next(iter(model.parameters())).place.is_gpu_place() else "cpu"
    if device is not None and where not in str(device).replace("cuda", "gpu"):
        raise GenerationError(
            f"The model is on the {where}, not on {shown_value(str(device))}. Leave device out, or call "
            "paddle.device.set_device before the model is loaded."
        )


def _template_name(tokenizer, convo_template: str, model_name: str) -> str | None:
    """The template to use; None for the tokenizer's own."""
    if convo_template or tokenizer.chat_template is not None:
        return convo_template or None
    known, template = template_by_name(model_name)
    if template is not None:
        return template.name
    what = "is a base model, tuned with no chat template" if known else "is not a known chat model"
    raise ConfigError(
        f"{shown_value(model_name)} {what}, and the tokenizer carries none.\nKnown models: {', '.join(PUBLISHED)}. "
        f"Or name a template, convo_template=one of {', '.join(TEMPLATES)}; or continue the plain text with sft=False."
    )


# ---------------------------------------------------------------------------------------------------- history


def messages_of(history: Iterable, text: str) -> list[dict]:
    """The messages of a history of pairs or messages, and the user's text behind them. Raises ChatError."""
    messages: list[dict] = []
    for number, item in enumerate(history):
        if isinstance(item, Mapping):
            messages.append(dict(item))
        elif isinstance(item, tuple | list) and len(item) == 2:
            messages += [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
        else:
            raise ChatError(
                f"Entry {number} of the history is {shown_value(item)}.\n"
                'Write (user, answer) pairs, or messages {"role": ..., "content": ...}.'
            )
    if messages and messages[-1].get("role") == "user":
        raise ChatError("The history ends with a message of the user that has no answer. Take it out: it is the text.")
    return [*messages, {"role": "user", "content": text}]


def append_turn(history: list, text: str, answer: str) -> None:
    """Put a turn at the end of a history, in the form its last entry has."""
    if history and isinstance(history[-1], Mapping):
        history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    else:
        history.append((text, answer))


def _fitted(prompts: ChatPrompts, messages: list[dict], max_length: int, max_gen_len: int) -> list[int]:
    """The prompt's ids, without the oldest turns where there is no room for them."""
    if max_gen_len >= max_length:
        raise GenerationError(
            f"max_gen_len is {max_gen_len}, and the model holds {max_length} tokens, prompt and answer. Ask for fewer."
        )
    messages, dropped = prompts.fit(messages, max_length - max_gen_len)
    if dropped:
        log.warning("The history is too long for the model: the oldest %d turns were left out.", dropped)
    return prompts.encode(messages)


# --------------------------------------------------------------------------------------------------- the engine


def engine_of(model) -> Engine:
    """The engine the model keeps for predict, of one slot; made anew when weights have changed since."""
    found, engine = model.__dict__.get(ENGINE, (None, None))
    now = _fingerprint(model)
    if engine is None or found != now:
        engine = Engine(model, slots=1)
        model.__dict__[ENGINE] = (now, engine)
    return engine


def _fingerprint(model) -> int:
    """Another number after a training step or after loading other weights: the first row of each parameter.

    Keys and values of an earlier conversation are wrong then, and neither an optimizer nor set_state_dict says so.
    """
    return hash(tuple((id(p), p[:1].numpy().tobytes()) for p in model.parameters()))


def _answer(model, engine: Engine, ids: list[int], params: SamplingParams, answer: Answer) -> str:
    """The answer's text. Raises what ended it, if an error did."""
    training = model.training
    model.eval()
    try:
        (sequence,) = engine.add(ids, params, answer)
        run(engine, [sequence])
    finally:
        if training:
            model.train()
    raise_error(sequence)
    return answer.text


def _eos(tokenizer) -> tuple[int, ...]:
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
