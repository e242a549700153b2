"""llama3 and yarn in whole models: logits and long greedy answers equal transformers', on both sides of the original
context; and a scaling that is a little wrong does not pass."""

import numpy as np
import paddle
import pytest
import torch
from twins import KINDS, LLAMA3, YARN, assert_close, ids, paddle_model, torch_model

from aquila_pd.generation import Engine, SamplingParams

ORIGINAL, MOST = YARN["original_max_position_embeddings"], KINDS["yarn"]["max_position_embeddings"]
TOLERANCE = 1e-5  # fp32 in two libraries: 1.3e-6 at most was measured, with logits of spread 0.56
SEEN = 1e-2

FORMS = {
    "llama3": LLAMA3,
    "llama3, other bounds": {**LLAMA3, "low_freq_factor": 1.5, "high_freq_factor": 3.0, "factor": 3.0},
    "yarn": YARN,
    "yarn without an original context": {"type": "yarn", "factor": 4.0},
    "yarn by the ratio of contexts": {**YARN, "factor": 2.0},  # transformers does not look at the factor then
    "yarn not truncated": {**YARN, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5},
    "yarn with an attention factor": {**YARN, "attention_factor": 1.4},
    "yarn with two mscales": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5},
}


def both(scaling: dict, **ours):
    """A torch model with this scaling and its Paddle twin, whose config may differ in `ours`."""
    theirs = torch_model(scaling["type"], rope_scaling=scaling)
    return theirs, paddle_model(theirs, scaling["type"], **{"rope_scaling": scaling, **ours})


@paddle.no_grad()
def logits_of(theirs, ours, length: int) -> tuple:
    tokens = ids(1, length)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    return ours(paddle.to_tensor(tokens))[0].numpy(), expected


@pytest.mark.parametrize("name", FORMS)
def test_logits_equal_transformers_below_and_above_the_original_context_and_beyond_all(name):
    theirs, ours = both(FORMS[name])
    for length in (ORIGINAL - 10, ORIGINAL + 50, MOST + 20):
        assert_close(*logits_of(theirs, ours, length), TOLERANCE, f"logits of {length} tokens")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (LLAMA3, {"low_freq_factor": 2.0}),
        (LLAMA3, {"high_freq_factor": 6.0}),
        (LLAMA3, {"original_max_position_embeddings": 64}),
        (YARN, {"attention_factor": 1.0}),  # forgotten
        (YARN, {"original_max_position_embeddings": 64}),
        (YARN, {"beta_slow": 0.25}),
        (YARN, {"truncate": False}),
    ],
    ids=lambda said: next(iter(said)) if len(said) == 1 else said["type"],
)
def test_control_a_scaling_that_is_a_little_wrong_is_seen_at_any_length(right, wrong):
    pair = both(right, rope_scaling={**right, **wrong})
    for length in (ORIGINAL - 10, ORIGINAL + 50):
        found, expected = logits_of(*pair, length)
        assert np.abs(found - expected).max() > SEEN


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_long_greedy_answers_of_the_engine_equal_transformers_also_with_a_reused_prefix(kind):
    """The engine's keys are made at many lengths; none of these scalings looks at the length, so they may be shared."""
    theirs, ours = both(KINDS[kind]["rope_scaling"])
    engine = Engine(ours, slots=2)
    assert engine.context_length == MOST
    first = ids(1, ORIGINAL + 8)[0].tolist()
    for prompt in (first[:10], first, [*first[:-4], 5, 6, 7]):
        new = MOST - len(prompt) if len(prompt) == 10 else 30
        with torch.no_grad():
            answer = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(prompt) :].tolist()
        (sequence,) = engine.generate([prompt], SamplingParams(temperature=0, max_new_tokens=new))[0]
        assert sequence.tokens == answer
    assert sequence.reused >= ORIGINAL


def test_control_with_dynamic_scaling_no_prefix_beyond_the_trained_length_is_reused():
    engine = Engine(paddle_model(torch_model("dynamic"), "dynamic"), slots=2)
    prompt = ids(1, 40)[0].tolist()
    for _ in range(2):
        (sequence,) = engine.generate([prompt], SamplingParams(temperature=0, max_new_tokens=2))[0]
    assert sequence.reused == 0
