"""A training step on one side: forward, backward, AdamW, on the same weights and the same full rows of tokens.

Every class loads its folder when it is made and has `step(arrays, recompute=...)`, which returns the mean loss before
the step; the arrays are those of `packs`. Ours is what the trainer of aquila_pd.sft runs. Nothing is clipped.
process.py runs one of them in a process of its own.
"""

import time

import numpy as np
from device import paddle_device, torch_device

RATE, BETAS, EPSILON = 1e-5, (0.9, 0.95), 1e-8


def packs(batch: int, length: int, samples: int) -> dict[str, np.ndarray]:
    """Rows of equal samples: ids, shifted labels, positions, segments, int64 [batch, length]. All places are learned,
    but the last of each sample where there are several."""
    each = length // samples
    ids = np.random.default_rng(0).integers(3, 500, (batch, length))
    places = np.tile(np.arange(each), samples)
    labels = np.roll(ids, -1, axis=1)
    return {
        "input_ids": ids,
        "labels": labels if samples == 1 else np.where(places < each - 1, labels, -100),
        "position_ids": np.broadcast_to(places, ids.shape).copy(),
        "segment_ids": np.broadcast_to(np.repeat(np.arange(1, samples + 1), each), ids.shape).copy(),
    }


def who_sees_whom(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """Booleans [batch, 1, length, length] for those who know no segments; None for rows of one sample."""
    segments = arrays["segment_ids"]
    if segments.max() == 1:
        return None
    same = segments[:, :, None] == segments[:, None, :]
    return (same & np.tri(segments.shape[1], dtype=bool))[:, None]


class Ours:
    def __init__(self, folder: str, *, threads: int, dtype: str):
        from aquila_pd.modeling import AquilaForCausalLM
        from aquila_pd.sft.loop.loss import SummedLoss
        from aquila_pd.sft.loop.optimizer import adamw
        from aquila_pd.sft.recipe.load import Optim

        self.device = paddle_device(threads)
        self.model = SummedLoss(AquilaForCausalLM.from_pretrained(folder, dtype=dtype))
        self.model.train()
        self.optimizer = adamw(self.model, Optim(betas=BETAS, eps=EPSILON), RATE)

    def step(self, arrays: dict[str, np.ndarray], *, recompute: bool) -> float:
        import paddle

        self.model.model.aquila.enable_recompute = recompute  # as the trainer has it
        learned = int((arrays["labels"] != -100).sum())
        loss = self.model(**{name: paddle.to_tensor(array) for name, array in arrays.items()}) / learned
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        return float(loss)


class Transformers:
    def __init__(self, folder: str, *, threads: int, dtype: str):
        import torch
        from transformers import LlamaForCausalLM

        self.torch, self.device = torch, torch_device(threads)
        self.model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(self.device.name)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0)

    def step(self, arrays: dict[str, np.ndarray], *, recompute: bool) -> float:
        if recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        given = {name: self._tensor(arrays[name]) for name in ("input_ids", "position_ids")}
        mask = who_sees_whom(arrays)
        if mask is not None:
            given["attention_mask"] = self._tensor(mask)
        logits = self.model(**given, use_cache=False).logits
        loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), self._tensor(arrays["labels"]).flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _tensor(self, array: np.ndarray):
        return self.torch.from_numpy(array).to(self.model.device)


class PaddleNLP:
    def __init__(self, folder: str, *, threads: int, dtype: str):
        import paddle
        from paddlenlp.transformers import LlamaForCausalLM

        self.paddle, self.device = paddle, paddle_device(threads)
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, low_cpu_mem_usage=True)
        self.model.train()
        self.optimizer = paddle.optimizer.AdamW(
            RATE, *BETAS, EPSILON, parameters=self.model.parameters(), weight_decay=0.0
        )

    def step(self, arrays: dict[str, np.ndarray], *, recompute: bool) -> float:
        self.model.llama.enable_recompute = recompute
        given = {name: self.paddle.to_tensor(arrays[name]) for name in ("input_ids", "labels", "position_ids")}
        mask = who_sees_whom(arrays)
        mask = np.ones_like(arrays["input_ids"]) if mask is None else mask
        loss = self.model(**given, attention_mask=self.paddle.to_tensor(mask), return_dict=True).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        return float(loss)


def step(side, *, batch: int, length: int, recompute: bool, samples: int = 1, before: int = 0) -> dict:
    """Time of a step on random rows [batch, length], the loss before it, and the most memory in use from its beginning
    or that of so many steps before it, MB."""
    arrays = packs(batch, length, samples)
    device = side.device
    device.reset_peak()
    for _ in range(before):
        side.step(arrays, recompute=recompute)
    cpu, begin = time.process_time(), device.mark()
    loss = side.step(arrays, recompute=recompute)
    (seconds,) = device.seconds([begin, device.mark()])
    return {"seconds": seconds, "cpu": time.process_time() - cpu, "peak_mb": device.peak() / 1e6, "loss": loss}


SIDES = {"aquila_pd": Ours, "transformers": Transformers, "PaddleNLP": PaddleNLP}
MEASURES = {"step": step}
