"""Against numbers the original torch implementation left behind (shared/goldens), to the tolerances a port meets."""

import json

import numpy as np
import paddle
import pytest
from safetensors.torch import load_file
from twins import adamw, assert_close, fill, gradient_norm, is_projection, paddle_name, shifted

from aquila_pd import AquilaConfig, AquilaForCausalLM
from aquila_pd.fusion_ops import rms_norm, rope
from aquila_pd.ops.rope import RotaryEmbedding

MODELS = ("tiny-7b", "tiny-34b", "tiny-16k", "tiny-ntk", "tiny-tied")
LOGITS = HIDDEN = 1e-4
EMBEDDING = "model.embed_tokens.weight"
NO_HALF = paddle.device.get_device() == "cpu"
_built: dict = {}


class Golden:
    """One golden model on Paddle (fp32), and its numbers."""

    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in ("torch_dtype", "auto_map")}
        self.model = AquilaForCausalLM(AquilaConfig(**config))
        self.state = {}
        for shard in sorted(folder.glob("*.safetensors")):
            self.state.update(load_file(shard))
        self.numbers = np.load(folder / "golden.npz")
        self.names = json.loads((folder / "param_names.json").read_text())
        self.reset()

    def reset(self):
        fill(self.model, self.state)
        self.model.clear_gradients()
        self.model.eval()

    def __getitem__(self, key):
        return self.numbers[key]

    def __contains__(self, key):
        return key in self.numbers.files

    def tensor(self, key):
        return paddle.to_tensor(self.numbers[key])


@pytest.fixture(params=MODELS)
def golden(request, shared):
    if request.param not in _built:
        _built[request.param] = Golden(shared / "goldens" / request.param)
    built = _built[request.param]
    built.reset()
    return built


@pytest.fixture
def ops(shared):
    return np.load(shared / "goldens" / "ops.npz")


# ------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("eps", ["1e-05", "1e-06"])
@pytest.mark.parametrize(("short", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_rms_norm_has_aquilas_order_to_the_last_bit(ops, eps, short, dtype):
    x, w, y, llama = (ops[f"rms.{eps}.{short}.{key}"] for key in ("x", "w", "y", "y_current_llama_order"))
    found = rms_norm(paddle.to_tensor(x).astype(dtype), paddle.to_tensor(w).astype(dtype), float(eps))
    found = found.astype("float32").numpy()
    assert (found == y).all(), f"{(found != y).sum()} of {y.size} values differ"
    assert (found != llama).mean() > 0.2, "control: LLaMA's order rounds a quarter of the values differently"


@pytest.mark.parametrize("eps", ["1e-05", "1e-06"])
def test_rms_norm_in_fp32(ops, eps):
    x, w, y = (ops[f"rms.{eps}.fp32.{key}"] for key in "xwy")
    assert_close(rms_norm(paddle.to_tensor(x), paddle.to_tensor(w), float(eps)), y, 1e-6)


SCALINGS = {
    "default": {},
    "theta5e5": dict(rope_theta=5e5),
    "linear4": dict(rope_scaling={"type": "linear", "factor": 4.0}),
    "linear8": dict(rope_scaling={"type": "linear", "factor": 8.0}),
    "dyn2": dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
}


def _rotary(head_dim: int, **scaling) -> RotaryEmbedding:
    config = AquilaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=64, num_hidden_layers=1, **scaling
    )
    return RotaryEmbedding(config)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("length", [1, 64, 100])
@pytest.mark.parametrize("head_dim", [32, 48, 128])
def test_angles_are_exact(ops, kind, length, head_dim):
    """One unit in the last place of cos at most: frequencies and products must be the same bits to get there."""
    rotary = _rotary(head_dim, **SCALINGS[kind])
    cos, sin = rotary(paddle.to_tensor([[length - 1]]), length)
    prefix = f"rope.{kind}.hd{head_dim}.s{length}"
    assert_close(cos.flatten(), ops[f"{prefix}.cos_last"], 1e-7, "cos")
    assert_close(sin.flatten(), ops[f"{prefix}.sin_last"], 1e-7, "sin")


def test_dynamic_scaling_forgets_a_long_input(ops):
    """Upstream keeps the stretched base after a long input; ours depends on the length at hand alone."""
    rotary = _rotary(32, **SCALINGS["dyn2"])
    rotary(paddle.to_tensor([[99]]), 100)
    cos, _ = rotary(paddle.to_tensor([[63]]), 64)
    assert_close(cos.flatten(), ops["rope.dyn2.hd32.s64.cos_last"], 1e-7)
    with pytest.raises(AssertionError):
        assert_close(cos.flatten(), ops["rope.dyn2.hd32.after100_s64.cos_last"], 1e-2)


def test_rotation(ops):
    angles = _rotary(32)(paddle.to_tensor(ops["apply.pos"]), 5)
    q, k = (paddle.to_tensor(ops[f"apply.{name}"]).transpose([0, 2, 1, 3]) for name in "qk")
    q, k = rope(q, k, angles)
    assert_close(q.transpose([0, 2, 1, 3]), ops["apply.q_out"], 1e-6)
    assert_close(k.transpose([0, 2, 1, 3]), ops["apply.k_out"], 1e-6)


# ----------------------------------------------------------------------------------------- forward pass


@paddle.no_grad()
def test_logits_hidden_states_attention_and_keys(golden):
    found = golden.model(
        golden.tensor("input_ids"), output_hidden_states=True, output_attentions=True, use_cache=True, return_dict=True
    )
    assert_close(found.logits, golden["nopad.logits_fp32"], LOGITS, "logits")
    assert_close(paddle.stack(list(found.hidden_states)), golden["nopad.hidden_states"], HIDDEN, "hidden states")
    assert_close(found.attentions[0], golden["nopad.attn_layer0"], 1e-5, "attention of layer 0")
    keys = list(found.past_key_values)[-1][0].transpose([0, 2, 1, 3])
    assert_close(keys, golden["nopad.key_cache_last_layer"], HIDDEN, "keys of the last layer")


@pytest.mark.parametrize("side", ["rightpad", "leftpad"])
@paddle.no_grad()
def test_padding(golden, side):
    logits, cache = golden.model(
        golden.tensor(f"{side}.input_ids"), attention_mask=golden.tensor(f"{side}.attention_mask"), use_cache=True
    )[:2]
    real = golden[f"{side}.attention_mask"].astype(bool)
    logits = logits.numpy()
    assert np.isfinite(logits).all()
    assert_close(logits[real], golden[f"{side}.logits_fp32"][real], LOGITS, "logits at real tokens")
    if side == "leftpad":  # logits hardly see wrong positions; these keys move by 5 to 11
        keys, expected = cache[0][0].numpy(), golden["leftpad.key_cache_layer0"].transpose(0, 2, 1, 3)
        assert_close(keys[real], expected[real], HIDDEN, "keys of layer 0")


def _cached(model, tokens, sizes):
    """Logits of each piece, one forward pass per piece over a growing cache."""
    cache, found, start = None, [], 0
    for size in sizes:
        piece = tokens[:, start : start + size]
        logits, cache = model(piece, past_key_values=cache, use_cache=True)
        found.append(logits)
        start += size
    return found


@paddle.no_grad()
def test_cached_steps_and_chunks(golden):
    tokens, first = golden.tensor("input_ids"), int(golden["kv.prefill_len"])
    rest = tokens.shape[1] - first
    found = _cached(golden.model, tokens, [first] + [1] * rest)
    steps = paddle.concat([found[0][:, -1:], *found[1:]], axis=1)
    assert_close(steps, golden["kv.step_logits_fp32"], LOGITS, "single steps")
    chunk = golden["kv.chunk_logits_fp32"]
    found = _cached(golden.model, tokens, [first, chunk.shape[1]])
    assert_close(found[1], chunk, LOGITS, "a chunk")


@paddle.no_grad()
def test_past_max_positions(golden):
    if "long.input_ids" not in golden:
        pytest.skip("this golden model has no long input")
    tokens = golden.tensor("long.input_ids")
    logits = golden.model(tokens)[0]
    assert_close(logits[:, -16:], golden["long.logits_fp32_last16"], LOGITS)
    assert_close(logits[:, :4], golden["long.logits_fp32_first4"], LOGITS)
    start, expected = int(golden["long.cross_start"]), golden["long.cross_step_logits_fp32"]
    found = _cached(golden.model, tokens, [start] + [1] * expected.shape[1])
    crossing = paddle.concat([found[0][:, -1:], *found[1:]], axis=1)[:, : expected.shape[1]]
    assert_close(crossing, expected, LOGITS, "steps across max positions")


@pytest.mark.skipif(NO_HALF, reason="Paddle has no half-precision CPU kernels: this test ran on no device here")
@pytest.mark.parametrize(
    ("dtype", "short", "mean", "worst"), [("bfloat16", "bf16", 0.08, 1.0), ("float16", "fp16", 0.012, 0.15)]
)
@paddle.no_grad()
def test_half_precision(golden, dtype, short, mean, worst):
    golden.model.to(dtype=dtype)
    try:
        difference = np.abs(golden.model(golden.tensor("input_ids"))[0].numpy() - golden[f"nopad.logits_{short}"])
    finally:
        golden.model.to(dtype="float32")
    assert difference.mean() < mean and difference.max() < worst


# ------------------------------------------------------------------------------------------- generation


def _assert_same_until_eos(found, expected, eos: int):
    for row, wanted in zip(found, expected, strict=True):
        length = int(np.argmax(wanted == eos)) + 1 if eos in wanted else len(wanted)
        assert (row[:length] == wanted[:length]).all(), f"{row[:length]} instead of {wanted[:length]}"


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_greedy_ids(golden, use_cache):
    prompt = golden.tensor("greedy.prompt")
    # Under dynamic scaling the two differ: cached keys keep the angles of the length at which they were made.
    key = "greedy.ids" if use_cache or "greedy_nocache.ids" not in golden else "greedy_nocache.ids"
    expected = golden[key][:, prompt.shape[1] :]
    found, _ = golden.model.generate(prompt, max_new_tokens=expected.shape[1], use_cache=use_cache)
    _assert_same_until_eos(found.numpy(), expected, golden.model.config.eos_token_id)


def test_greedy_ids_with_left_padding(golden):
    prompt, keep = golden.tensor("leftpad.input_ids"), golden.tensor("leftpad.attention_mask")
    expected = golden["greedy_leftpad.ids"][:, prompt.shape[1] :]
    assert (golden["greedy_leftpad.ids"][:, : prompt.shape[1]] == prompt.numpy()).all()
    found, _ = golden.model.generate(prompt, attention_mask=keep, max_new_tokens=expected.shape[1])
    _assert_same_until_eos(found.numpy(), expected, golden.model.config.eos_token_id)


# --------------------------------------------------------------------------------------------- training


def test_loss_and_gradients(golden):
    loss = golden.model(
        golden.tensor("loss.input_ids"),
        attention_mask=golden.tensor("loss.attention_mask"),
        labels=paddle.to_tensor(shifted(golden["loss.labels"])),
    )[0]
    loss.backward()
    assert abs(float(loss) - float(golden["loss.value"])) <= 1e-5
    gradients = {name: parameter.grad for name, parameter in golden.model.named_parameters()}
    for name, expected in zip(golden.names, golden["loss.grad_norms"], strict=True):
        found = gradient_norm(gradients[paddle_name(name)])
        assert abs(found - expected) <= 1e-4 * expected, f"gradient norm of {name}: {found} instead of {expected}"
    for key in (key for key in golden.numbers.files if key.startswith("loss.grad.")):
        name, expected = key.removeprefix("loss.grad.").replace("embed_rows_0_to_7", EMBEDDING), golden[key]
        found = gradients[paddle_name(name)].numpy()
        found = found.T if is_projection(name) else found[: expected.shape[0]]
        assert_close(found, expected, 1e-4 * max(1.0, np.abs(expected).max()), f"gradient of {name}")


def test_twenty_training_steps(golden):
    model, optimizer = golden.model, adamw(golden.model)
    model.train()
    for step, expected in enumerate(golden["train.losses"]):
        tokens, labels = golden["train.batches"][step % 4], golden["train.labels"][step % 4]
        loss = model(paddle.to_tensor(tokens), labels=paddle.to_tensor(shifted(labels)))[0]
        loss.backward()
        total = np.sqrt(sum(gradient_norm(p.grad) ** 2 for p in model.parameters()))
        assert abs(float(loss) - expected) <= 2e-4, f"step {step}: loss {float(loss)} instead of {expected}"
        wanted = golden["train.grad_norms"][step]
        assert abs(total - wanted) <= 1e-3 * wanted + 1e-3, f"step {step}: gradient norm {total} instead of {wanted}"
        optimizer.step()
        optimizer.clear_grad()
    for name, expected in zip(golden.names, golden["train.final_param_norms"], strict=True):
        found = gradient_norm(model.state_dict()[paddle_name(name)])
        assert abs(found - expected) <= 1e-4 * expected, f"norm of {name}: {found} instead of {expected}"
