"""Overrides for PaddleNLP's generate(): masks, positions, stop ids and sampling options as Hugging Face has them.

PaddleNLP's loops (greedy, sampling, beams) stay; what goes into them is put right here: masks, positions, caches,
embeddings as input, ids of any integer type, several end tokens, temperature 0, and logits that are not numbers.
"""

import paddle

from ..runtime.base import LogitsProcessor
from ..utils.errors import GenerationError
from .kv_cache import KVCache

# What generate() takes by keyword beside the fields of GenerationConfig.
_OURS = {
    "attention_mask",
    "position_ids",
    "inputs_embeds",
    "past_key_values",
    "logits_processors",
    "synced_gpus",
    "with_cache",
}


class MinNewTokens(LogitsProcessor):
    """No end token before min_length tokens (prompt included); unlike PaddleNLP's, with any number of end tokens."""

    def __init__(self, min_length: int, eos_token_id: int | list[int]):
        self.min_length = min_length
        self.eos_token_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)

    def __call__(self, input_ids, logits):
        if input_ids.shape[-1] < self.min_length:
            logits[:, self.eos_token_ids] = paddle.finfo(logits.dtype).min
        return logits


class AquilaGeneration:
    """Overrides of paddlenlp.generation.GenerationMixin; stands before it in the model's bases."""

    def generate(self, input_ids=None, generation_config=None, stopping_criteria=None, streamer=None, **kwargs):
        """Continue prompts; PaddleNLP's generate() with its own parameters, returning (new ids [B, T'], scores).

        Args:
            input_ids: int32 or int64 [B, T], padded on the left. Or inputs_embeds [B, T, D] by keyword.
            attention_mask: by keyword, [B, T] of 1/0 or booleans. Without one, pad ids are masked, as HF does.
            temperature: 0 means greedy. do_sample, num_beams: choose the strategy as in HF.
            use_cache: False recomputes everything at each step.

        Raises:
            GenerationError: an unknown parameter, or NaN or infinite logits.
        """
        settings = generation_config or self.generation_config
        kwargs = _strategy(kwargs, settings)
        _check_settings(kwargs, settings, self.config)
        # GenerationConfig swallows use_cache, and the loops then never see it; under another name they do.
        kwargs["with_cache"] = kwargs.pop("use_cache", getattr(settings, "use_cache", True))
        unknown = [name for name in kwargs if not hasattr(settings, name) and name not in _OURS]
        if unknown:
            raise GenerationError(f"generate() knows no {', '.join(sorted(unknown))}. Check the spelling.")

        embeds = kwargs.get("inputs_embeds")
        if input_ids is not None:
            input_ids = _as_ids(input_ids)
        elif embeds is not None:
            # PaddleNLP counts on a begin token that stands in for the embeddings; its id is never read.
            kwargs.setdefault("bos_token_id", settings.bos_token_id or self.config.bos_token_id or 0)
        mask = kwargs.get("attention_mask")
        if mask is None and embeds is not None:
            mask = paddle.ones(embeds.shape[:2], dtype="int64")
        if mask is not None:
            if mask.ndim != 2:
                raise GenerationError(f"generate() takes an attention_mask [batch, tokens], not {mask.ndim}-D.")
            kwargs["attention_mask"] = mask.astype("int64")
        return super().generate(input_ids, generation_config, stopping_criteria, streamer, **kwargs)

    @staticmethod
    def prepare_attention_mask_for_generation(input_ids, pad_token_id, eos_token_id):
        """[B, T] of 1/0: pad ids are padding, unless the pad token also ends a text and so may be meant."""
        ends = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
        if pad_token_id is None or pad_token_id in ends:
            return paddle.ones_like(input_ids)
        return (input_ids != pad_token_id).astype("int64")

    def prepare_inputs_for_generation(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        with_cache: bool = True,
        **_,
    ) -> dict:
        """Arguments of forward() for the next step: only what the cache does not hold yet, logits of the last place."""
        if with_cache and past_key_values is None:
            past_key_values = KVCache(self.config.num_hidden_layers)
        cached = isinstance(past_key_values, KVCache)
        started = past_key_values.length > 0 if cached else bool(past_key_values)
        inputs = {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": with_cache,
            "logits_to_keep": 1,
        }
        if started:  # one token, or more behind the cache of a prefix
            new = attention_mask.shape[1] - past_key_values.length if cached else 1
            inputs["input_ids"] = input_ids[:, -new:]
        elif inputs_embeds is None:
            inputs["input_ids"] = input_ids
        else:  # then what was generated so far, behind the stand-in for the embeddings
            tail = input_ids[:, 1:]
            generated = [self.base_model.embed(tail)] if tail.shape[1] else []
            inputs["inputs_embeds"] = paddle.concat([inputs_embeds, *generated], axis=1)
        if position_ids is not None:
            inputs["position_ids"] = position_ids[:, -new:] if started else position_ids
        return inputs

    @staticmethod
    def update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False):
        """One token further. The cache goes under one name only: beam search reorders each name it finds."""
        cache = next((v for v in outputs[1:2] if not isinstance(v, paddle.Tensor)), None)
        model_kwargs["past_key_values"] = cache
        model_kwargs.pop("cache", None)
        mask = model_kwargs["attention_mask"]
        one_more = paddle.ones([mask.shape[0], 1], dtype=mask.dtype)
        model_kwargs["attention_mask"] = paddle.concat([mask, one_more], axis=-1)
        if model_kwargs.get("position_ids") is not None:
            p = model_kwargs["position_ids"]
            model_kwargs["position_ids"] = paddle.concat([p, p[:, -1:] + 1], axis=-1)
        return model_kwargs

    @staticmethod
    def expand_inputs_for_generation(input_ids, expand_size, attention_mask=None, **model_kwargs):
        """Each row expand_size times, for beams and several samples; embeddings too, which PaddleNLP forgets."""
        model_kwargs["attention_mask"] = attention_mask

        def repeat(x):
            return paddle.repeat_interleave(x, expand_size, axis=0)

        for name in ("attention_mask", "position_ids", "inputs_embeds"):
            if model_kwargs.get(name) is not None:
                model_kwargs[name] = repeat(model_kwargs[name])
        return repeat(input_ids), model_kwargs

    def reorder_cache(self, cache, beam_idx):
        """Beam search: row b goes on from the old row beam_idx[b]."""
        if isinstance(cache, KVCache):
            cache.reorder(beam_idx)
            return cache
        return None if cache is None else super().reorder_cache(cache, beam_idx)

    def get_logits_processor(self, min_length=None, max_length=None, eos_token_id=None, **kwargs):
        """PaddleNLP's list, with our minimum length in place of its own."""
        processors = super().get_logits_processor(None, max_length, eos_token_id, **kwargs)
        if min_length is not None and eos_token_id is not None:
            processors.append(MinNewTokens(min_length, eos_token_id))
        return processors

    def adjust_logits_during_generation(self, logits):
        """Every strategy passes its raw logits [B, V] here: refuse what is not a number."""
        finite = paddle.isfinite(logits).all(axis=-1)
        if not bool(finite.all()):
            rows = [row for row, ok in enumerate(finite.tolist()) if not ok]
            raise GenerationError(
                f"The model gave NaN or infinite logits for row {', '.join(map(str, rows))} of the batch. "
                "A damaged weight or an overflow in half precision does this: `aquila-pd convert --verify "
                "content` finds the first, dtype float32 or bfloat16 cures the second."
            )
        return logits


def _as_ids(input_ids):
    """Token ids [B, T] as int64, from a tensor, an array or lists."""
    ids = input_ids if isinstance(input_ids, paddle.Tensor) else paddle.to_tensor(input_ids)
    if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point():
        raise GenerationError(
            f"input_ids has shape {list(ids.shape)} and dtype {ids.dtype}; expected integers [batch, tokens]."
        )
    return ids.astype("int64")


def _check_settings(kwargs: dict, settings, config) -> None:
    """Raise GenerationError for values PaddleNLP would take and make nonsense of."""

    def value(name: str, default=None):
        return kwargs.get(name, getattr(settings, name, default))

    findings = []
    if value("max_new_tokens", 1) < 1:
        findings.append(f"max_new_tokens is {value('max_new_tokens')}; at least one token is generated")
    if value("temperature", 1.0) < 0:
        findings.append(f"temperature is {value('temperature')}; 0 is greedy, and there is nothing below")
    ends = value("eos_token_id") if value("eos_token_id") is not None else config.eos_token_id
    if value("decode_strategy") == "beam_search" and isinstance(ends, list) and len(ends) > 1:
        findings.append(f"PaddleNLP's beam search knows one end token, not {ends}: pass one eos_token_id")
    if findings:
        raise GenerationError("generate() cannot do that: " + "; ".join(findings) + ".")


def _strategy(kwargs: dict, settings) -> dict:
    """decode_strategy from do_sample, num_beams and temperature 0."""
    kwargs = dict(kwargs)
    do_sample = kwargs.pop("do_sample", None)
    beams = kwargs.get("num_beams", settings.num_beams)
    if beams > 1 and not do_sample:
        kwargs.setdefault("decode_strategy", "beam_search")
    elif do_sample is not None:
        kwargs.setdefault("decode_strategy", "sampling" if do_sample else "greedy_search")
    if kwargs.get("temperature", settings.temperature) == 0:
        kwargs["temperature"] = 1.0
        if kwargs.get("decode_strategy", settings.decode_strategy) == "sampling":
            kwargs["decode_strategy"] = "greedy_search"
    return kwargs
