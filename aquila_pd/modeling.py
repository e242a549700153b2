"""The Aquila2 decoder on Paddle, from leaf to root. Numerics follow the original torch implementation.

Loading and saving are in pretrained.py, generate() in model/generation_mixin.py, kernels in fusion_ops.py.
Letters in shapes: B batch, T query length, S key length, C key length with the cache's spare room, D hidden,
N query heads, K key/value heads, H head size, V vocabulary, L layers.
"""

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from .architecture.labels import IGNORE_INDEX
from .configuration import AquilaConfig
from .fusion_ops import Ops, attention_with_weights, select
from .model.classification import AquilaForSequenceClassification  # noqa: F401  one of the three Auto classes' models
from .model.generation_mixin import AquilaGeneration
from .model.kv_cache import KVCache
from .model.outputs import as_tuple, cache_beside_loss
from .model.pretrained import AquilaPretrainedModel
from .ops.attention_mask import Mask, PackedMask, causal_mask, full_mask, hide_beyond, keep_mask, positions
from .ops.fused_linear import product
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.rope import Angles, RotaryEmbedding
from .runtime.base import (
    BaseModelOutputWithPast,
    CausalLMOutputWithCrossAttentions,
    register_base_model,
)
from .runtime.malloc import keep_freed_memory
from .utils.errors import AquilaError, only_in_the_package

keep_freed_memory()  # results of operations are large and soon free again, and pages from the system are slow

HALF = (paddle.float16, paddle.bfloat16)


class RMSNorm(nn.Layer):
    """Root-mean-square norm over the last axis, weight [D]."""

    def __init__(self, config: AquilaConfig, ops: Ops):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = self.create_parameter([config.hidden_size], default_initializer=nn.initializer.Constant(1.0))
        self.rms_norm = ops.rms_norm

    def forward(self, x):
        return self.rms_norm(x, self.weight, self.eps)


class Attention(nn.Layer):
    """Grouped-query causal attention."""

    FUSABLE = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "output_proj": ("o_proj",)}

    def __init__(self, config: AquilaConfig, layer: int, ops: Ops):
        super().__init__()
        self.layer, self.ops = layer, ops
        self.N, self.K, self.H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D = config.hidden_size
        self.q_proj = nn.Linear(D, self.N * self.H, bias_attr=False)
        self.k_proj = nn.Linear(D, self.K * self.H, bias_attr=False)
        self.v_proj = nn.Linear(D, self.K * self.H, bias_attr=False)
        self.o_proj = nn.Linear(self.N * self.H, D, bias_attr=False)
        self.qkv_proj = self.output_proj = None  # stand in for the first three and the last after fuse_projections()

    def forward(self, x, angles: Angles, mask, cache: KVCache | None = None, output_attentions: bool = False):
        """x [B, T, D] -> [B, T, D], and the weights [B, N, T, S] or None."""
        B, T, _ = x.shape
        q, k, v = self.qkv_proj(x) if self.qkv_proj else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q = q.reshape([B, T, self.N, self.H])
        k, v = k.reshape([B, T, self.K, self.H]), v.reshape([B, T, self.K, self.H])
        q, k = self.ops.rope(q, k, angles)
        if cache is None:
            k, v = k.transpose([0, 2, 1, 3]), v.transpose([0, 2, 1, 3])  # [B, K, T, H]
        if output_attentions:  # only the plain twin has the weights
            if cache is not None:
                k, v = cache.append(self.layer, k, v)  # [B, K, C, H], the mask hides what is beyond S
            y, weights = attention_with_weights(q, k, v, mask.allowed)  # [B, T, N, H]
        elif cache is not None:
            y, weights = cache.attend(self.layer, q, k, v, mask, self.ops.attention), None
        elif isinstance(mask, PackedMask):
            y, weights = self.ops.packed_attention(q, k, v, mask), None
        else:
            y, weights = self.ops.attention(q, k, v, mask), None
        return (self.output_proj or self.o_proj)(y.reshape([B, T, self.N * self.H])), weights


class MLP(nn.Layer):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    FUSABLE = {"gate_up_proj": ("gate_proj", "up_proj"), "output_proj": ("down_proj",)}

    def __init__(self, config: AquilaConfig, ops: Ops):
        super().__init__()
        self.swiglu = ops.swiglu
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias_attr=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias_attr=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias_attr=False)
        self.gate_up_proj = self.output_proj = None  # stand in for the first two and the last after fuse_projections()

    def forward(self, x):
        gate, up = self.gate_up_proj(x) if self.gate_up_proj else (self.gate_proj(x), self.up_proj(x))
        return (self.output_proj or self.down_proj)(self.swiglu(gate, up))


class DecoderLayer(nn.Layer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: AquilaConfig, layer: int, ops: Ops):
        super().__init__()
        self.input_layernorm = RMSNorm(config, ops)
        self.self_attn = Attention(config, layer, ops)
        self.post_attention_layernorm = RMSNorm(config, ops)
        self.mlp = MLP(config, ops)

    def forward(self, x, angles: Angles, mask, cache: KVCache | None = None, output_attentions: bool = False):
        """x [B, T, D] -> [B, T, D]; with output_attentions a pair of that and the weights [B, N, T, S]."""
        y, weights = self.self_attn(self.input_layernorm(x), angles, mask, cache, output_attentions)
        x = x + y
        x = x + self.mlp(self.post_attention_layernorm(x))
        # A single tensor otherwise: Paddle's recompute wants it.
        return (x, weights) if output_attentions else x


@register_base_model
class AquilaModel(AquilaPretrainedModel):
    """The decoder without a head."""

    def __init__(self, config: AquilaConfig):
        super().__init__(config)
        ops = select()
        self.pad_token_id = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.LayerList([DecoderLayer(config, i, ops) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config, ops)
        self.rotary = RotaryEmbedding(config)
        self.enable_recompute = False  # PaddleNLP's recompute_enable() and Trainer set it

    def embed(self, input_ids):
        """[B, T] -> [B, T, D]. The pad id's row is used but gets no gradient from here, as torch's padding_idx.

        Paddle's own padding_idx would return zeros for it.
        """
        x = self.embed_tokens(input_ids)
        if self.pad_token_id is None or x.stop_gradient:
            return x
        is_pad = (input_ids == self.pad_token_id).unsqueeze(-1)
        return paddle.where(is_pad, x.detach(), x)

    def forward(
        self,
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        use_cache: bool | None = None,
        past_key_values=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        segment_ids=None,
    ):
        """Run the decoder.

        Args:
            input_ids: int [B, T]; or inputs_embeds [B, T, D] in its place.
            position_ids: int [B, T]; by default counted from attention_mask, so left padding needs nothing more.
            attention_mask: [B, S] of 1/0 or booleans for all S keys, cached ones included;
                3-D [B, T, S] and 4-D [B, 1, T, S] masks are taken as final.
            past_key_values: a KVCache (appended in place), or PaddleNLP's tuple of (k, v) [B, S, K, H].
            segment_ids: int [B, T] for rows that hold several samples: another number for each. They do not see each
                other, and positions count from the begin of each; in place of attention_mask and a cache.
            use_cache: return the cache; default is the config's in evaluation, False in training.

        Returns:
            BaseModelOutputWithPast, or without return_dict the tuple of what is not None among last hidden state
            [B, T, D], cache, hidden states (embeddings, layers 1..L-1, then the output after the final norm) and
            attentions (L of [B, N, T, S]).
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.use_return_dict if return_dict is None else return_dict
        x = self._embedded(input_ids, inputs_embeds)  # [B, T, D]
        # Not with weights to show: they would have to outlive the layer that recompute forgets.
        recomputing = self.enable_recompute and self.training and paddle.is_grad_enabled() and not output_attentions
        if recomputing and (use_cache or past_key_values is not None):
            raise AquilaError("Recompute runs each layer twice and cannot fill a cache; pass use_cache=False.")
        use_cache = False if use_cache is None and segment_ids is not None else use_cache
        cache, in_tuples = self._cache(past_key_values, use_cache)
        S = x.shape[1] + (cache.length if cache is not None else 0)
        mask, angles = self._mask_and_angles(x, attention_mask, position_ids, cache, S, segment_ids)
        if output_attentions and isinstance(mask, PackedMask):
            mask = Mask(mask.full())
        if recomputing and x.stop_gradient:  # frozen embeddings (LoRA): recompute would take it for the graph's end
            x = x.detach()
            x.stop_gradient = False
        hidden_states, attentions = [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x)
            if recomputing:
                x = recompute(layer, x, angles, mask)
            elif output_attentions:
                x, weights = layer(x, angles, mask, cache, output_attentions=True)
                attentions.append(weights[..., :S])
            else:
                x = layer(x, angles, mask, cache)
        x = self.norm(x)

        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache.to_tuple() if in_tuples else cache,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict else as_tuple(output)

    def _embedded(self, input_ids, inputs_embeds):
        """Input of the first layer, [B, T, D]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise AquilaError("Give either input_ids or inputs_embeds, and not both.")
        weight = self.embed_tokens.weight
        if weight.dtype in HALF and weight.place.is_cpu_place():
            raise AquilaError(f"Paddle has no CPU kernels to compute in {weight.dtype}. Load the model as float32.")
        return self.embed(input_ids) if inputs_embeds is None else inputs_embeds

    def _mask_and_angles(self, x, attention_mask, position_ids, cache: KVCache | None, S: int, segment_ids):
        """The Mask [B or 1, 1, T or 1, C], or a PackedMask for segments; and the angles."""
        if segment_ids is not None:
            return self._packed_mask_and_angles(segment_ids, attention_mask, position_ids, cache)
        B, T, _ = x.shape
        if attention_mask is not None and attention_mask.ndim != 2:
            keep, mask = keep_mask(None, B, S), full_mask(attention_mask, B, T, S)
        else:
            keep = keep_mask(attention_mask, B, S)
            mask = causal_mask(keep, T)
        if cache is not None:
            mask = hide_beyond(mask, cache.reserve(T))
        mask = Mask(mask, end=S if attention_mask is None else None)
        return mask, self.rotary(positions(keep, T) if position_ids is None else position_ids, S)

    def _packed_mask_and_angles(self, segment_ids, attention_mask, position_ids, cache: KVCache | None):
        """The PackedMask of rows that hold several samples, and the angles."""
        if attention_mask is not None or cache is not None:
            raise AquilaError("segment_ids say who sees whom: pass neither attention_mask nor a cache with them.")
        mask = PackedMask(segment_ids)
        return mask, self.rotary(mask.positions if position_ids is None else position_ids, mask.lengths)

    def _cache(self, past_key_values, use_cache: bool | None):
        """The cache to append to or None, and whether the caller speaks in tuples.

        By default there is one outside of training, as the config says: training does not generate.
        """
        wanted = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if past_key_values is None:
            return (KVCache(self.config.num_hidden_layers) if wanted else None), False
        if isinstance(past_key_values, KVCache):
            return past_key_values, False
        return KVCache.from_tuple(past_key_values, self.config.num_hidden_layers), True


def zero_or_nan(logits):
    """Added to a loss: Paddle's CPU cross-entropy of NaN logits is an ordinary number, log V; this is NaN then."""
    return logits.detach().sum() * 0 if logits.place.is_cpu_place() else 0.0


class AquilaPretrainingCriterion(nn.Layer):
    """Mean cross-entropy in fp32 over the labels that are not -100; the plain twin of AquilaForCausalLM's own loss.

    Labels follow PaddleNLP: already shifted, labels[t] is the target of position t. Without any valid label the
    loss is 0. (F.cross_entropy with reduction="mean" would divide by all positions, ignored ones too.)
    """

    def forward(self, logits, labels):
        """logits [B, T, V], labels int [B, T] -> scalar."""
        V = logits.shape[-1]
        losses = F.cross_entropy(
            logits.astype("float32").reshape([-1, V]), labels.reshape([-1]), reduction="none", ignore_index=IGNORE_INDEX
        )
        valid = (labels != IGNORE_INDEX).astype("float32").sum()
        return losses.sum() / valid.clip(min=1.0) + zero_or_nan(logits)


class AquilaForCausalLM(AquilaGeneration, AquilaPretrainedModel):
    """The decoder with its language-model head."""

    def __init__(self, config: AquilaConfig):
        super().__init__(config)
        self.aquila = AquilaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias_attr=False)
        self.criterion = AquilaPretrainingCriterion()
        self._transposed_head = ()  # after fuse_projections() on a CPU, for a tied head: the embedding as [D, V]

    def get_output_embeddings(self):
        return None if self.config.tie_word_embeddings else self.lm_head

    def fuse_projections(self) -> None:
        super().fuse_projections()
        weight = self.aquila.embed_tokens.weight
        if self.config.tie_word_embeddings and weight.place.is_cpu_place() and weight.dtype == paddle.float32:
            # MKL takes twice as long for a few rows with [V, D] transposed: worth the memory of a second table.
            with paddle.no_grad():
                self._transposed_head = (weight.t().contiguous(),)

    def unfuse_projections(self) -> None:
        super().unfuse_projections()
        self._transposed_head = ()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        super().set_input_embeddings(value)
        self._transposed_head = ()

    def logits(self, x):
        """[B, T, D] -> [B, T, V] in fp32, through the embedding itself when the head is tied."""
        if self._transposed_head and not paddle.is_grad_enabled():
            return product(x, *self._transposed_head)
        if self.config.tie_word_embeddings:
            return paddle.matmul(x, self.aquila.embed_tokens.weight, transpose_y=True).astype("float32")
        return product(x, self.lm_head.weight).astype("float32")

    def summed_loss(self, x, labels, logits=None, places=None):
        """The sum of the losses of x [n, D] at labels int [n], through the head; see linear_cross_entropy."""
        tied = self.config.tie_word_embeddings
        weight = self.aquila.embed_tokens.weight if tied else self.lm_head.weight
        return linear_cross_entropy(x, weight, labels, transposed=tied, logits=logits, places=places)

    def _mean_loss(self, x, logits, labels):
        """The criterion's loss of x [B, T, D], without the gradients of all logits [B, T, V] in memory at once."""
        flat = labels.reshape([-1])
        learned = paddle.nonzero(flat != IGNORE_INDEX).squeeze(1)  # [n]
        # An adapter in the head, a custom criterion, or products that autocast makes in half precision.
        other = not self.config.tie_word_embeddings and type(self.lm_head) is not nn.Linear
        other = other or type(self.criterion) is not AquilaPretrainingCriterion or paddle.is_autocast_enabled()
        if other or learned.shape[0] == 0:
            return self.criterion(logits, labels)
        rows = paddle.gather(x.reshape([-1, x.shape[-1]]), learned)  # [n, D]
        made = logits.detach().reshape([-1, logits.shape[-1]])
        return self.summed_loss(rows, paddle.gather(flat, learned), made, learned) / learned.shape[0]

    def forward(
        self,
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        use_cache: bool | None = None,
        past_key_values=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        segment_ids=None,
    ):
        """Logits [B, T, V] in fp32, of the last `logits_to_keep` positions only when that is not 0.

        labels: int [B, T], already shifted (labels[t] is the target of position t), -100 where there is none.
        The other arguments and the forms of output are AquilaModel's; the tuple is (loss, logits, cache, ...)
        without what is None.
        """
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        if labels is not None and logits_to_keep:
            raise AquilaError("labels need the logits of every position: leave logits_to_keep at 0.")
        output = self.aquila(
            input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=cache_beside_loss(use_cache, labels),
            past_key_values=past_key_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            segment_ids=segment_ids,
        )
        x = output.last_hidden_state  # [B, T, D]
        logits = self.logits(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None if labels is None else self._mean_loss(x, logits, labels)
        if not return_dict:
            return (*(() if loss is None else (loss,)), logits, *as_tuple(output)[1:])
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def predict(self, text: str, tokenizer=None, **options) -> str:
        """Answer a text as upstream's predict() does, without its defects; aquila_pd/chat/predict.py has the options.

        Raises InstallationError in a converted folder used where aquila_pd is not installed: generate() works there.
        """
        with only_in_the_package("predict()"):
            from aquila_pd.chat.predict import predict
        return predict(self, text, tokenizer, **options)
