"""The same tiny model in torch and in Paddle, mapped by hand: these names and transpositions do not come from
weight_map.py, so a mistake in the table cannot hide itself."""

import numpy as np
import paddle
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aquila_pd import AquilaConfig, AquilaForCausalLM

# Sizes all different, norm weights away from 1, grouped heads: equal sizes hide a lost transpose.
BASE = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=24,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    pad_token_id=0,
    bos_token_id=99,
    eos_token_id=100,
    tie_word_embeddings=False,
)
LLAMA3 = {
    "type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
KINDS = {
    "mha": dict(num_key_value_heads=8),
    "gqa": {},
    "mqa": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "theta": dict(rope_theta=500000.0),
    "linear": dict(rope_scaling={"type": "linear", "factor": 4.0}),
    "dynamic": dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
    # Heads of 8 whose four wavelengths, 6 to 199, lie on both sides of the original context.
    "llama3": dict(num_attention_heads=4, rope_theta=100.0, max_position_embeddings=128, rope_scaling=LLAMA3),
    "yarn": dict(num_attention_heads=4, rope_theta=100.0, max_position_embeddings=128, rope_scaling=YARN),
}


def torch_model(kind: str = "gqa", **changes) -> LlamaForCausalLM:
    """A random LLaMA-shaped torch model in fp32: in fp32 the same function as Aquila2."""
    fields = {**BASE, **KINDS[kind], **changes}
    if "rope_scaling" in fields:
        fields["rope_scaling"] = {"rope_type": fields["rope_scaling"]["type"], **fields["rope_scaling"]}
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Larger than any initialization, so that a wrong order or a wrong row moves the logits.
            weight.copy_(0.3 + 0.2 * torch.rand_like(weight) if "norm" in name else 0.25 * torch.randn_like(weight))
    return model


def paddle_name(name: str) -> str:
    return "aquila." + name.removeprefix("model.") if name.startswith("model.") else name


def is_projection(name: str) -> bool:
    return name.endswith("proj.weight") or name in ("lm_head.weight", "score.weight")


def to_paddle(name: str, tensor: torch.Tensor) -> np.ndarray:
    """A torch parameter or gradient as Paddle stores it."""
    array = tensor.detach().float().numpy()
    return np.ascontiguousarray(array.T if is_projection(name) else array)


def fill(model, state: dict) -> None:
    """Set every parameter of a Paddle model from a torch state dict; a missing one is an error."""
    given = {paddle_name(name): to_paddle(name, tensor) for name, tensor in state.items()}
    for name, parameter in model.state_dict().items():
        assert list(given[name].shape) == parameter.shape, name
        parameter.set_value(given[name])


def paddle_model(torch_one: LlamaForCausalLM, kind: str = "gqa", cls=AquilaForCausalLM, **changes):
    """The Paddle model with the same weights."""
    model = cls(AquilaConfig(**{**BASE, **KINDS[kind], **changes}))
    fill(model, torch_one.state_dict())
    model.eval()
    return model


def pair(kind: str = "gqa", **changes):
    torch_one = torch_model(kind, **changes)
    return torch_one, paddle_model(torch_one, kind, **changes)


def ids(rows: int = 2, length: int = 11, seed: int = 3) -> np.ndarray:
    """Token ids without pad, bos and eos."""
    return np.random.default_rng(seed).integers(1, 99, [rows, length])


def shifted(labels: np.ndarray) -> np.ndarray:
    """Hugging Face's labels as PaddleNLP's: the target of position t stands at t."""
    return np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], axis=1)


def assert_close(found, expected, tolerance: float, what: str = "values") -> None:
    """Largest absolute difference at most tolerance; the message names the worst place."""
    found = np.asarray(found.numpy() if isinstance(found, paddle.Tensor) else found)
    expected = np.asarray(expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    worst = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf)), difference.shape)
    assert difference[worst] <= tolerance, (
        f"{what} differ by {difference[worst]:.3e} at {tuple(map(int, worst))}: "
        f"{found[worst]!r} instead of {expected[worst]!r} (tolerance {tolerance:.0e})"
    )


def gradient_norm(gradient) -> float:
    # In float64: Paddle's Tensor.norm() in fp32 is off by up to 1.5e-4.
    return float(np.sqrt((np.asarray(gradient, dtype=np.float64) ** 2).sum()))


def adamw(model, **changes):
    """The optimizer of the reference training runs, on Paddle's side; controls change something about it."""
    settings = dict(
        learning_rate=1e-3,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        weight_decay=0.1,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
    )
    return paddle.optimizer.AdamW(parameters=model.parameters(), **{**settings, **changes})
