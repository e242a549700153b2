"""Steps on real rows beside torch: the same packs, transformers' LLaMA, torch's AdamW, peft's LoRA."""

import json

import numpy as np
import pytest
import torch
from chat_factory import write_aquila_tokenizer
from paths import SHARED
from peft import LoraConfig, get_peft_model
from sft_factory import Recorder, packs, stage, trainer_of
from twins import assert_close, paddle_model, torch_model

from aquila_pd.adapters.lora import adapter_state, attach
from aquila_pd.data.samples import Samples, SamplesWriter
from aquila_pd.data.targets import encode_conversation
from aquila_pd.sft.loop.batches import Packs, Steps
from aquila_pd.text.prompts import ChatPrompts
from aquila_pd.tokenizer import AquilaTokenizer

STEPS, FEW_STEPS, LENGTH, BATCH = 20, 8, 384, 4
LONGEST = 180  # tokens of a sample, so that several share a pack
ROLE = {"human": "user", "gpt": "assistant"}
WANTED = 2e-4  # absolute, of losses; in float32 on both sides


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = write_aquila_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return AquilaTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory, vocabulary) -> Packs:
    """Packs of the first real rows that fit, one and several turns mixed."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder of shared data at {SHARED}: this test did not run")
    folder = tmp_path_factory.mktemp("data")
    prompts = ChatPrompts(vocabulary, "aquila-v1")
    files = [SHARED / "data" / name for name in ("alpaca_sharegpt.jsonl", "multi_turn.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()[:200]]
    (folder / "samples").mkdir()
    with SamplesWriter(folder / "samples") as writer:
        for number, row in enumerate(rows, 1):
            turns = [{"role": ROLE[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
            sample = encode_conversation(prompts, turns)
            if len(sample.ids) <= LONGEST:
                writer.add(sample.ids, sample.is_target, file=0, row=number)
        writer.finish(["rows"])
    found = packs(Samples.open(folder / "samples"), folder / "plans", epochs=6, length=LENGTH)
    assert sum(found.arrays(i)["segment_ids"].max() for i in range(BATCH)) > 2 * BATCH  # several samples in a pack
    return found


def settings(**changes):
    asked = dict(length=LENGTH, global_batch=BATCH, micro_batch=2, max_steps=STEPS, lr=1e-3, warmup_steps=4)
    return stage(**{**asked, "epochs": 6.0, "clip": 0.5, **changes})


def torch_run(
    model, data: Packs, *, steps: int = STEPS, packed: bool = True, decay: float = 0.1
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the same steps, written down without looking at ours."""
    model.train()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if "norm" not in name], "weight_decay": decay},
        {"params": [p for name, p in trained if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(steps):
        rate = 1e-3 * ((step + 1) / 4 if step < 4 else (1 + np.cos(np.pi * (step - 4) / (steps - 4))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        arrays = [data.arrays(number) for number in range(step * BATCH, (step + 1) * BATCH)]
        batch = {name: torch.tensor(np.stack([pack[name] for pack in arrays])) for name in arrays[0]}
        segments = batch["segment_ids"]
        sees = torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool)).expand(BATCH, -1, -1)
        if packed:
            sees = sees & (segments[:, :, None] == segments[:, None, :])
        mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[:, None]
        logits = model(batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([p for _, p in trained], 0.5)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def paddle_run(folder, model, data: Packs, of) -> Recorder:
    trainer, reporter = trainer_of(folder, of, model=model, data=data)
    trainer.run(None)
    return reporter


SIZES = dict(max_position_embeddings=LENGTH, hidden_size=48, intermediate_size=76)


def pair(vocabulary):
    sizes = SIZES | {"vocab_size": len(vocabulary)}
    theirs = torch_model(**sizes)
    with torch.no_grad():  # a model that begins near chance, as a trained one does not: gradients of every layer
        for name, weight in theirs.named_parameters():
            if "norm" not in name:
                weight.mul_(0.2)
    return theirs, paddle_model(theirs, **sizes)


def test_full_training_has_torchs_losses(tmp_path, data, vocabulary):
    theirs, ours = pair(vocabulary)
    found = paddle_run(tmp_path / "run", ours, data, settings(method="full"))
    losses, norms = torch_run(theirs, data)
    assert_close(np.array(found.losses), np.array(losses), WANTED)
    assert_close(np.array([record.grad_norm for record in found.steps]), np.array(norms), 2e-3)
    assert losses[-1] < losses[0] - 0.25 and max(norms) > 0.5  # it learns, and clipping had something to do
    assert any(r.valid_tokens != Steps(data, global_batch=BATCH).counts(0).labels for r in found.steps)


def test_control_torch_that_sees_across_samples_or_decays_otherwise_differs(data, vocabulary):
    right, _ = torch_run(pair(vocabulary)[0], data, steps=FEW_STEPS)
    for wrong in (dict(packed=False), dict(decay=1.0)):
        other, _ = torch_run(pair(vocabulary)[0], data, steps=FEW_STEPS, **wrong)
        assert np.abs(np.array(other) - np.array(right)).max() > 3 * WANTED, wrong


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_lora_has_pefts_losses(tmp_path, data, vocabulary, changes):
    theirs, ours = pair(vocabulary)
    of = settings(
        method="lora", max_steps=FEW_STEPS, r=4, alpha=16.0, targets=("q_proj", "v_proj", "down_proj"), **changes
    )
    attach(ours, of.lora)
    wrapped = get_peft_model(
        theirs,
        LoraConfig(
            r=4,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules=["q_proj", "v_proj", "down_proj"],
            use_rslora=changes.get("rslora", False),
            use_dora=changes.get("dora", False),
        ),
    )
    names = dict(wrapped.named_parameters())
    for name, tensor in adapter_state(ours).items():
        layer, kind = name.removeprefix("aquila.").rsplit(".", 1)
        if kind != "magnitude":  # that follows from the base
            theirs_name = f"base_model.model.model.{layer}.{kind}.default.weight"
            names[theirs_name].data.copy_(torch.tensor(tensor.numpy().T))
    found = paddle_run(tmp_path / "run", ours, data, of)
    losses, norms = torch_run(wrapped, data, steps=FEW_STEPS)
    assert_close(np.array(found.losses), np.array(losses), WANTED)
    assert_close(np.array([record.grad_norm for record in found.steps]), np.array(norms), 2e-3)
    assert losses[-1] < losses[0]
