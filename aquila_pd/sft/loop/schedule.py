"""Learning-rate schedule as a pure function of the step: warmup, then cosine, linear or constant."""

import math

from ..recipe.load import Optim


def warmup_steps(optim: Optim, steps: int) -> int:
    """Steps over which the rate rises, of `steps` in all."""
    if optim.warmup_steps is not None:
        return optim.warmup_steps
    return math.ceil((optim.warmup_ratio or 0.0) * steps)


def learning_rate(step: int, optim: Optim, steps: int) -> float:
    """The rate of step 0, 1, ... of `steps`.

    It rises in equal parts to lr, which the last step of the warmup has (the first has more than 0, so that it is not
    wasted), then falls towards min_lr, which the step after the last would have.
    """
    warmup = warmup_steps(optim, steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    left = 1.0 - done if optim.schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2
    return optim.min_lr + (optim.lr - optim.min_lr) * left
