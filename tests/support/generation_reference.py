"""What the engine is held against: a decoder in numpy without a cache, and sampling written the slowest obvious way.

Nothing here knows slots, chunks or blocks. Every token is computed from all ids before it, in float64.
Letters in shapes: T tokens, D hidden, N query heads, K key/value heads, H head size, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import paddle

from aquila_pd import AquilaConfig, AquilaForCausalLM
from aquila_pd.generation import Engine, SamplingParams, Sequence, TokenEvent
from aquila_pd.utils.errors import GenerationError

# Sizes all different, grouped heads, no multiple of 64 anywhere.
BASE = dict(
    vocab_size=101,
    hidden_size=40,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    pad_token_id=0,
    bos_token_id=99,
    eos_token_id=100,
)
KINDS = {
    "grouped heads": {},
    "one head for all": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "linear": dict(rope_scaling={"type": "linear", "factor": 4.0}, max_position_embeddings=24),
    "dynamic": dict(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=24),
}


def tiny_model(kind: str = "grouped heads", *, seed: int = 5, scale: float = 0.25, **changes) -> AquilaForCausalLM:
    """A random model: weights large enough that greedy answers vary, norm weights away from 1."""
    model = AquilaForCausalLM(AquilaConfig(**{**BASE, **KINDS[kind], **changes}))
    rng = np.random.default_rng(seed)
    for name, parameter in sorted(model.state_dict().items()):
        normal = scale * rng.standard_normal(parameter.shape)
        value = 0.4 + 0.4 * rng.random(parameter.shape) if "norm" in name else normal
        parameter.set_value(value.astype("float32"))
    model.eval()
    return model


def set_embedding(model, token: int, value: float) -> None:
    """Damage: one number of one row of the embedding."""
    weight = model.aquila.embed_tokens.weight.numpy()
    weight[token, 3] = value
    model.aquila.embed_tokens.weight.set_value(weight)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, the log-probability of each, and the smallest distance of a best logit to the second."""

    tokens: list[int]
    logprobs: list[float]
    margin: float


class Reference:
    """The model's mathematics once more; weights by the names and layout of its state_dict."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: tensor.numpy().astype(np.float64) for name, tensor in model.state_dict().items()}
        self._answers: dict[tuple, Answer] = {}

    def logits(self, ids: list[int], prompt_length: int | None = None) -> np.ndarray:
        """[T] -> [T, V]. prompt_length matters to dynamic scaling: the prompt was turned at once, the answer singly."""
        weights, config = self.weights, self.config
        lengths = np.maximum(np.arange(len(ids)) + 1, prompt_length or len(ids))
        angles = self._angles(lengths)
        x = weights["aquila.embed_tokens.weight"][ids]  # [T, D]
        for layer in range(config.num_hidden_layers):
            at = f"aquila.layers.{layer}."
            x = x + self._attention(self._norm(x, at + "input_layernorm.weight"), at + "self_attn.", angles)
            y = self._norm(x, at + "post_attention_layernorm.weight")
            gate, up = y @ weights[at + "mlp.gate_proj.weight"], y @ weights[at + "mlp.up_proj.weight"]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[at + "mlp.down_proj.weight"]
        x = self._norm(x, "aquila.norm.weight")
        tied = config.tie_word_embeddings
        return x @ (weights["aquila.embed_tokens.weight"].T if tied else weights["lm_head.weight"])

    def greedy(self, prompt: list[int], count: int) -> Answer:
        """The likeliest token, `count` times; remembered."""
        key = (*prompt, -1, count)
        if key not in self._answers:
            tokens, logprobs, margin = [], [], np.inf
            for _ in range(count):
                row = self.logits(prompt + tokens, len(prompt))[-1]
                second, first = np.sort(row)[-2:]
                margin = min(margin, float(first - second))
                tokens.append(int(row.argmax()))
                logprobs.append(float(log_softmax(row).max()))
            self._answers[key] = Answer(tokens, logprobs, margin)
        return self._answers[key]

    def token_logprobs(self, prompt: list[int], tokens: list[int]) -> np.ndarray:
        """log P of each of `tokens` after the prompt and those before it."""
        rows = log_softmax(self.logits(prompt + tokens, len(prompt)))
        return rows[np.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1), tokens]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps) * self.weights[name]

    def _angles(self, lengths: np.ndarray) -> np.ndarray:
        """[T] key lengths -> [T, H/2]."""
        config, H = self.config, self.config.head_dim
        scaling = config.rope_scaling or {"type": None, "factor": 1.0}
        factor, most = scaling["factor"], config.max_position_embeddings
        positions, base = np.arange(len(lengths), dtype=np.float64), np.full(len(lengths), config.rope_theta)
        if scaling["type"] == "linear":
            positions = positions / factor
        if scaling["type"] == "dynamic":
            stretch = factor * np.maximum(lengths, most) / most - (factor - 1)  # 1 up to the trained length
            base = base * stretch ** (H / (H - 2))
        return positions[:, None] / base[:, None] ** (np.arange(0, H, 2) / H)

    def _attention(self, x: np.ndarray, at: str, angles: np.ndarray) -> np.ndarray:
        T, N, K, H = len(x), self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        q, k, v = (
            (x @ self.weights[f"{at}{name}_proj.weight"]).reshape(T, heads, H).transpose(1, 0, 2)
            for name, heads in (("q", N), ("k", K), ("v", K))
        )
        k, v = np.repeat(k, N // K, axis=0), np.repeat(v, N // K, axis=0)
        scores = turned(q, angles) @ turned(k, angles).transpose(0, 2, 1) / np.sqrt(H)  # [N, T, T]
        scores = np.where(np.tril(np.ones((T, T), dtype=bool)), scores, -np.inf)
        y = np.exp(log_softmax(scores)) @ v  # [N, T, H]
        return y.transpose(1, 0, 2).reshape(T, N * H) @ self.weights[f"{at}o_proj.weight"]


def turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x [N, T, H] by angles [T, H/2], halves paired."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)


# --------------------------------------------------------------------------------------------------- sampling


def adjusted(logits, params, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Repetition penalty, presence and frequency, bias, the ban on stop ids; token by token, in float64."""
    x = [float(v) for v in logits]
    for token in range(len(x)):
        if token in prompt or token in tokens:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        if token in tokens:
            x[token] -= params.presence_penalty + params.frequency_penalty * tokens.count(token)
        x[token] += params.logit_bias.get(token, 0.0)
        if token in params.stop_ids and len(tokens) < params.min_new_tokens:
            x[token] = -np.inf
    return np.array(x)


def probabilities(logits, params) -> np.ndarray:
    """[V] -> [V] summing to 1: whole sorts, in the order `params.order` says."""
    x = np.array(logits, dtype=np.float64)
    heat = {"temperature": lambda x: (x - x.max()) / params.temperature}
    filters = {"top_k": lambda x: _top_k(x, params.top_k), "top_p": lambda x: _top_p(x, params.top_p)}
    steps = {**heat, **filters}
    names = ("temperature", "top_k", "top_p") if params.order == "standard" else ("top_p", "top_k", "temperature")
    for name in names:
        x = steps[name](x)
    p = np.exp(log_softmax(x))
    p = np.where(p >= params.min_p * p.max(), p, 0.0)
    return p / p.sum()


def _top_k(x: np.ndarray, k: int) -> np.ndarray:
    return x if not k or k >= len(x) else np.where(x >= np.sort(x)[-k], x, -np.inf)


def _top_p(x: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest likeliest that hold the share; of equal ones those with higher ids first (nothing says which)."""
    if top_p >= 1:
        return x
    p, held, kept = np.exp(log_softmax(x)), 0.0, []
    for token in sorted(range(len(x)), key=lambda i: (p[i], i), reverse=True):
        kept.append(token)
        held += p[token]
        if held >= top_p:
            break
    result = np.full(len(x), -np.inf)
    result[kept] = x[kept]
    return result


@paddle.no_grad()
def forward_logits(model, ids: list[int]) -> np.ndarray:
    """The model's own logits [T, V] of one sequence, without a cache."""
    return model(paddle.to_tensor([ids]), use_cache=False, return_dict=True).logits[0].numpy()


# Logits of every kind: rng, V -> [V].
ROWS = {
    "ordinary": lambda rng, V: rng.normal(0, 3, V),
    "nearly flat": lambda rng, V: rng.normal(0, 1e-3, V),
    "steep": lambda rng, V: rng.normal(0, 40, V),
    "one huge": lambda rng, V: np.where(np.arange(V) == V // 3, 3e4, rng.normal(0, 2, V)),
    "large offset": lambda rng, V: 1e4 + rng.normal(0, 3, V).astype(np.float32).astype(np.float64),
    "mostly banned": lambda rng, V: np.where(rng.random(V) < 0.8, -np.inf, rng.normal(0, 3, V)),
    "one allowed": lambda rng, V: np.where(np.arange(V) == V - 1, -5.0, -np.inf),
    "ties": lambda rng, V: rng.integers(-3, 3, V).astype(np.float64),
    "all equal": lambda rng, V: np.full(V, 1.25),
}


def row_of(kind: str, V: int, seed: int) -> np.ndarray:
    row = ROWS[kind](np.random.default_rng(seed), V).astype(np.float32)
    if not np.isfinite(row).any():
        row[0] = 0.0
    return row


def unless_refused(**fields) -> SamplingParams | None:
    """For values far beyond float32: refusing them by name is as good as taking them for what they say."""
    try:
        return SamplingParams(**fields)
    except GenerationError as refused:
        assert any(name in str(refused) for name in fields)
        return None


def sequence_of(params: SamplingParams, prompt=(1,), tokens=()) -> Sequence:
    return Sequence(0, list(prompt), params, tokens=list(tokens))


# ----------------------------------------------------------------------------------- around an engine

MARGIN = 1e-4  # between the two best logits wherever tokens are compared; float32 is off by 5e-6
CLOSE = 1e-4  # of log-probabilities


def some_ids(length: int, seed: int = 0, *, but: tuple[int, ...] = ()) -> list[int]:
    return (
        np.random.default_rng([seed, length])
        .choice([i for i in range(BASE["vocab_size"]) if i not in but], length)
        .tolist()
    )


def greedy(count: int, **fields) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=count, **fields)


def expected(reference: Reference, prompt: list[int], count: int) -> list[int]:
    answer = reference.greedy(prompt, count)
    assert answer.margin > MARGIN, "two tokens are nearly as likely: nothing can be compared here, take other ids"
    return answer.tokens


def run(engine: Engine, *, most: int = 5000) -> None:
    for _ in range(most):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


class Ear:
    """A listener that remembers."""

    def __init__(self, act=None):
        self.events: list[TokenEvent] = []
        self.act = act

    def __call__(self, event: TokenEvent):
        self.events.append(event)
        return self.act(event) if self.act else None

    @property
    def lasts(self) -> list[str]:
        return [event.finish_reason for event in self.events if event.finish_reason]

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if event.token is not None]
