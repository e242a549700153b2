"""Prefill and decoding on one side: our engine, transformers' and PaddleNLP's LLaMA, each as its users call it.

Every class loads its folder when it is made and has

    prefill(ids)              [B, T] prompts -> the token after each, [B]
    generate(ids, new, step)  greedy; calls step() after every token of all rows -> tokens [B, new]
    device                    of device.py

process.py runs one of them in a process of its own; parts.py says which are compared.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from checkpoints import bytes_per_token
from device import paddle_device, torch_device

WARM_UP = 8  # tokens


class Ours:
    """The engine, which reads a prompt in one pass here. settings: sampling=True draws with temperature and top_p."""

    def __init__(self, folder: str, *, threads: int, dtype: str, sampling: bool = False):
        from aquila_pd.generation import SamplingParams
        from aquila_pd.modeling import AquilaForCausalLM

        self.device = paddle_device(threads)
        self.model = AquilaForCausalLM.from_pretrained(folder, dtype=dtype, fused=True)
        self.model.eval()
        chosen = dict(temperature=0.8, top_p=0.9, seed=1) if sampling else dict(temperature=0)
        self.params = lambda new: SamplingParams(max_new_tokens=new, **chosen)
        self.engines, self.draws = {}, sampling

    def prefill(self, ids: np.ndarray) -> list[int]:
        return [row[0] for row in self.generate(ids, 1, lambda: None)]

    def generate(self, ids: np.ndarray, new: int, step: Callable[[], None]) -> list[list[int]]:
        engine = self._engine(*ids.shape)
        made = [engine.add(row, self.params(new))[0] for row in ids.tolist()]
        while engine.step():
            step()
        return [sequence.tokens for sequence in made]

    def overhead(self) -> float:
        """The share of the engine's time outside the model, over all that was generated."""
        stats = [engine.stats for engine in self.engines.values()]
        return 1 - sum(s.forward_seconds for s in stats) / sum(s.step_seconds for s in stats)

    def _engine(self, batch: int, length: int):
        """One for each size of request: its buffers stay as large as the longest prompt it has seen."""
        from aquila_pd.generation import Engine

        if (batch, length) not in self.engines:
            chunk = batch * length
            self.engines[batch, length] = Engine(self.model, slots=batch, prefix_reuse=False, prefill_chunk=chunk)
        return self.engines[batch, length]


class Transformers:
    """transformers' LLaMA. settings: last=True computes logits of the last position only, as its generate() does."""

    def __init__(self, folder: str, *, threads: int, dtype: str, last: bool = False):
        import torch
        from transformers import LlamaForCausalLM

        self.torch, self.device = torch, torch_device(threads)
        self.model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).eval()
        self.model.to(self.device.name)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.kept = {"logits_to_keep": 1} if last else {}

    def _tensor(self, ids: np.ndarray):
        return self.torch.from_numpy(np.ascontiguousarray(ids)).to(self.model.device)

    def prefill(self, ids: np.ndarray) -> list[int]:
        with self.torch.no_grad():
            logits = self.model(self._tensor(ids), use_cache=True, **self.kept).logits  # [B, T or 1, V]
            return logits[:, -1].argmax(-1).tolist()

    def generate(self, ids: np.ndarray, new: int, step: Callable[[], None]) -> list[list[int]]:
        from transformers import StoppingCriteriaList

        def after_step(ids, scores, **_):
            step()
            return self.torch.zeros(len(ids), dtype=self.torch.bool, device=ids.device)

        given = self._tensor(ids)
        found = self.model.generate(
            given,
            attention_mask=self.torch.ones_like(given),
            max_new_tokens=new,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([after_step]),
        )
        return found[:, ids.shape[1] :].tolist()


class PaddleNLP:
    """PaddleNLP's LLaMA, with the same choice of MKL's kernels as ours."""

    def __init__(self, folder: str, *, threads: int, dtype: str):
        import paddle
        from paddlenlp.transformers import LlamaForCausalLM

        self.paddle, self.device = paddle, paddle_device(threads)
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, low_cpu_mem_usage=True)
        self.model.eval()

    def prefill(self, ids: np.ndarray) -> list[int]:
        with self.paddle.no_grad():
            given = self.paddle.to_tensor(np.ascontiguousarray(ids))
            mask = self.paddle.ones_like(given)
            logits = self.model(given, attention_mask=mask, use_cache=True, return_dict=True).logits  # [B, T, V]
            return logits[:, -1].argmax(-1).tolist()

    def generate(self, ids: np.ndarray, new: int, step: Callable[[], None]) -> list[list[int]]:
        from paddlenlp.generation.stopping_criteria import StoppingCriteriaList

        def after_step(input_ids, logits, **_):
            step()
            return False

        given = self.paddle.to_tensor(np.ascontiguousarray(ids))
        with self.paddle.no_grad():
            found, _ = self.model.generate(
                given,
                attention_mask=self.paddle.ones_like(given),
                max_new_tokens=new,
                decode_strategy="greedy_search",
                eos_token_id=-1,  # never drawn, so that all rows run to the end
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([after_step]),
            )
        return found.tolist()


class Limit:
    """What no decoder can be faster than: the bytes of the weights it has to read, over the memory's bandwidth.

    The bandwidth is that of a plain copy (bytes read and written) or a plain read of 1 GB by as many threads,
    whichever is higher; on a GPU a copy on the device.
    """

    SIZE = 1 << 30

    def __init__(self, shape: str, *, threads: int, dtype: str):
        self.device = paddle_device(threads)
        self.bytes = bytes_per_token(shape, dtype)
        if self.device.name == "gpu":
            import paddle

            self.source = paddle.ones([self.SIZE // 4])
            return
        self.threads = ThreadPoolExecutor(threads)
        source = np.ones(self.SIZE // 8, dtype=np.uint64)
        self.halves = list(zip(np.array_split(source, threads), np.array_split(source.copy(), threads), strict=True))

    def bandwidth(self) -> float:
        """Bytes a second, the best of a few tries."""
        if self.device.name == "gpu":
            marks = [self.device.mark()]
            for _ in range(5):
                self.source.clone()
                marks.append(self.device.mark())
            return 2 * self.SIZE / min(self.device.seconds(marks))
        copied = self._best(lambda pair: np.copyto(pair[1], pair[0]))
        read = self._best(lambda pair: np.bitwise_or.reduce(pair[0]))
        return max(2 * self.SIZE / copied, self.SIZE / read)

    def _best(self, work: Callable) -> float:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            list(self.threads.map(work, self.halves))
            times.append(time.perf_counter() - begin)
        return min(times)

    def decode(self) -> dict:
        """Seconds in which the weights of one token can be read."""
        found = self.bandwidth()
        return {"seconds": self.bytes / found, "bandwidth": found}


# ------------------------------------------------------------------------------------------------ what is measured


def prompts(batch: int, length: int) -> np.ndarray:
    """The same random ids for every side, int64 [B, T]; of the first ids, which every vocabulary has."""
    return np.random.default_rng(0).integers(3, 500, (batch, length))


def prefill(side, *, length: int, batch: int = 1) -> dict:
    """Time until the token after the prompt is known; most memory in use meanwhile, MB."""
    ids, device = prompts(batch, length), side.device
    device.reset_peak()
    cpu, begin = time.process_time(), device.mark()
    tokens = side.prefill(ids)
    (seconds,) = device.seconds([begin, device.mark()])
    spent = time.process_time() - cpu
    return {"seconds": seconds, "cpu": spent, "peak_mb": device.peak() / 1e6, "tokens": [[t] for t in tokens]}


def decode(side, *, length: int, new: int, batch: int = 1) -> dict:
    """Median time of a token after the first (machines are noisy), for all rows together; processor time likewise."""
    if isinstance(side, Limit):
        return side.decode()
    ids, device = prompts(batch, length), side.device
    marks, spent = [], []

    def step() -> None:
        marks.append(device.mark())
        spent.append(time.process_time())

    device.reset_peak()
    tokens = side.generate(ids, new, step)
    seconds = float(np.median(device.seconds(marks)))
    found = {"seconds": seconds, "cpu": float(np.mean(np.diff(spent))), "peak_mb": device.peak() / 1e6}
    found["rate"] = batch / seconds  # tokens/s
    if not getattr(side, "draws", False):
        found["tokens"] = [row[:4] for row in tokens]  # later ones may part where two logits are nearly equal
    return found | ({"overhead": side.overhead()} if isinstance(side, Ours) else {})


def memory(side, *, length: int) -> dict:
    """Memory in MB that reading a prompt takes beyond the loaded model; wants a fresh process."""
    side.prefill(prompts(1, WARM_UP))
    held = side.device.held()
    found = prefill(side, length=length)
    return found | {"extra_mb": found["peak_mb"] - held / 1e6}


SIDES = {"aquila_pd": Ours, "transformers": Transformers, "PaddleNLP": PaddleNLP, "limit": Limit}
MEASURES = {"prefill": prefill, "decode": decode, "memory": memory}
