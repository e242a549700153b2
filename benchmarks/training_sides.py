"""A training step on one side: forward, backward, AdamW, on the same weights and the same full rows of tokens.

Every class loads its folder when it is made and has `step(ids, labels, recompute=...)`, which returns the mean loss
before the step; labels are already shifted. Ours is what the trainer of aquila_pd.sft runs. Nothing is clipped.
process.py runs one of them in a process of its own; training.py compares steps on packs of several samples.
"""

import time

import numpy as np
from device import paddle_device, torch_device

RATE, BETAS, EPSILON = 1e-5, (0.9, 0.95), 1e-8


class Ours:
    def __init__(self, folder: str, *, threads: int, dtype: str):
        from aquila_pd.modeling import AquilaForCausalLM
        from aquila_pd.sft.loss import SummedLoss
        from aquila_pd.sft.optimizer import adamw
        from aquila_pd.sft.recipe import Optim

        self.device = paddle_device(threads)
        self.model = SummedLoss(AquilaForCausalLM.from_pretrained(folder, dtype=dtype))
        self.model.train()
        self.optimizer = adamw(self.model, Optim(betas=BETAS, eps=EPSILON), RATE)

    def step(self, ids: np.ndarray, labels: np.ndarray, *, recompute: bool) -> float:
        import paddle

        self.model.model.aquila.enable_recompute = recompute  # as the trainer has it
        arrays = {
            "input_ids": ids,
            "labels": labels,
            "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy(),
            "segment_ids": np.ones_like(ids),
        }
        loss = self.model(**{name: paddle.to_tensor(array) for name, array in arrays.items()}) / labels.size
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

    def step(self, ids: np.ndarray, labels: np.ndarray, *, recompute: bool) -> float:
        if recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        given, targets = (self.torch.from_numpy(array).to(self.model.device) for array in (ids, labels))
        logits = self.model(given, use_cache=False).logits
        loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


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

    def step(self, ids: np.ndarray, labels: np.ndarray, *, recompute: bool) -> float:
        self.model.llama.enable_recompute = recompute
        given, targets = self.paddle.to_tensor(ids), self.paddle.to_tensor(labels)
        loss = self.model(given, attention_mask=self.paddle.ones_like(given), labels=targets, return_dict=True).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        return float(loss)


def step(side, *, batch: int, length: int, recompute: bool) -> dict:
    """Time of a step on random rows [batch, length]; most memory in use meanwhile, MB; the loss before it."""
    ids = np.random.default_rng(0).integers(3, 500, (batch, length))
    labels = np.roll(ids, -1, axis=1)
    device = side.device
    device.reset_peak()
    cpu, begin = time.process_time(), device.mark()
    loss = side.step(ids, labels, recompute=recompute)
    (seconds,) = device.seconds([begin, device.mark()])
    return {"seconds": seconds, "cpu": time.process_time() - cpu, "peak_mb": device.peak() / 1e6, "loss": loss}


SIDES = {"aquila_pd": Ours, "transformers": Transformers, "PaddleNLP": PaddleNLP}
MEASURES = {"step": step}
