"""An engine without a model: the prompt itself says what it answers. For fast tests of everything around the engine.

say<text>      answers with the text, a token a step, then the end token; § in it is said as #, which a template may
               have taken apart in the prompt
endless        "la " until the limit
slow           20 ms a step (of all requests)
nan<3>         NaN logits after 3 tokens
boom<3>        an exception out of step() after 3 tokens
anything else  answers with ANSWER
"""

import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from aquila_pd.generation import (
    NonFiniteLogits,
    PromptTooLong,
    SamplingParams,
    Sequence,
    Stats,
    TokenEvent,
    TokenLogprob,
)

ANSWER = "你好 🙂, please!"
NAN, BOOM = "nan", "boom"


class FakeEngine:
    """The interface of aquila_pd.generation.Engine; draws what the prompt's text asks for."""

    def __init__(self, tokenizer, *, slots: int = 4, max_length: int = 256, step_seconds: float = 0.0):
        self.tokenizer, self.slots, self.max_length = tokenizer, slots, max_length
        self.vocab_size = len(tokenizer)
        self.step_seconds = step_seconds
        self.stats = Stats()
        self.running: list[tuple[Sequence, Iterator]] = []
        self.waiting: deque[tuple[Sequence, Iterator]] = deque()
        self.resets = self.cancelled = 0
        self.reset_fails = False

    # ------------------------------------------------------------------------------------------ the interface

    def add(self, prompt, params: SamplingParams, listener=None) -> list[Sequence]:
        if len(prompt) > self.max_length - (1 if params.max_new_tokens else 0):
            raise PromptTooLong("too long")
        made = [Sequence(i, list(prompt), params, listener) for i in range(params.n)]
        self.waiting += [(sequence, self.script(sequence)) for sequence in made]
        self.count()
        return made

    def step(self) -> bool:
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self.waiting.popleft())
        if not self.running:
            return False
        time.sleep(self.step_seconds)
        for sequence, script in list(self.running):
            if sequence.finish_reason is None:
                self.advance(sequence, script)
        self.stats.steps += 1
        self.count()
        return True

    def cancel(self, sequence: Sequence) -> None:
        if sequence.finish_reason is None:
            self.cancelled += 1
            self.finish(sequence, "cancelled")

    def reset(self, error: Exception | None = None) -> None:
        self.resets += 1
        if self.reset_fails:
            raise RuntimeError("reset fails too")
        for sequence, _ in [*self.running, *self.waiting]:
            self.finish(sequence, "error", error=error)

    # ---------------------------------------------------------------------------------------------- its workings

    def script(self, sequence: Sequence) -> Iterator[int | str]:
        """What a sequence draws, token by token."""
        text = self.tokenizer.decode(sequence.prompt, skip_special_tokens=False)
        fault = re.search(r"(nan|boom)<(\d+)>", text)
        said = re.findall(r"say<(.*?)>", text, re.DOTALL)
        ids = self.ids(said[-1].replace("§", "#") if said else ANSWER)
        if "endless" in text:
            ids = self.ids("la ") * 10_000
        if fault:
            return iter([*ids[: int(fault[2])], fault[1]])
        return iter([*ids, *sequence.params.stop_ids[:1]])

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def advance(self, sequence: Sequence, script: Iterator) -> None:
        params = sequence.params
        if not sequence.tokens:
            if params.prompt_logprobs:
                sequence.prompt_logprobs += [None, *(self.logprob(i, params) for i in sequence.prompt[1:])]
            self.stats.prompt_tokens += len(sequence.prompt)
        if params.max_new_tokens == 0:
            self.finish(sequence, "length")
            return
        token = next(script, 0)
        if "slow" in self.tokenizer.decode(sequence.prompt):
            time.sleep(0.02)
        if token == NAN:
            self.stats.nonfinite += 1
            self.finish(sequence, "error", error=NonFiniteLogits("The model gave NaN or infinite logits here."))
            return
        if token == BOOM:
            raise RuntimeError("the engine went boom")
        logprob = None if params.logprobs is None else self.logprob(token, params)
        sequence.tokens.append(token)
        if logprob:
            sequence.logprobs.append(logprob)
        self.stats.new_tokens += 1
        if token in params.stop_ids:
            sequence.stop_id = token
            self.finish(sequence, "stop", token=token, logprob=logprob)
        elif len(sequence.tokens) == params.max_new_tokens or sequence.length >= self.max_length:
            self.finish(sequence, "length", token=token, logprob=logprob)
        elif sequence.listener and sequence.listener(TokenEvent(sequence, token, logprob, None)):
            self.finish(sequence, "stop", tell=False)

    def logprob(self, token: int, params: SamplingParams) -> TokenLogprob:
        """-0.5 for every drawn token, and the ids that follow it as the less likely ones."""
        top = tuple(((token + i) % self.vocab_size, -0.5 - i) for i in range(params.logprobs or 0))
        return TokenLogprob(token, -0.5, top)

    def finish(self, sequence: Sequence, reason: str, *, token=None, logprob=None, error=None, tell=True) -> None:
        sequence.finish_reason, sequence.error = reason, error
        self.stats.finished[reason] += 1
        self.running = [pair for pair in self.running if pair[0] is not sequence]
        self.waiting = deque(pair for pair in self.waiting if pair[0] is not sequence)
        if tell and sequence.listener:
            sequence.listener(TokenEvent(sequence, token, logprob, reason))
        self.count()

    def count(self) -> None:
        self.stats.running, self.stats.waiting = len(self.running), len(self.waiting)


def fake_model(folder: Path, **options) -> SimpleNamespace:
    """What chat.loading.load() would return for a folder that holds only a tokenizer."""
    from aquila_pd.text.prompts import ChatPrompts
    from aquila_pd.tokenizer import AquilaTokenizer

    tokenizer = AquilaTokenizer.from_pretrained(str(folder))
    prompts = ChatPrompts(tokenizer, "aquila-v1")
    engine = FakeEngine(tokenizer, **options)
    return SimpleNamespace(
        name="fake", tokenizer=tokenizer, engine=engine, prompts=prompts, stop_ids=(tokenizer.eos_token_id,)
    )
