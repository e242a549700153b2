"""AdamW with states named by parameter, and the global gradient norm over ranks."""

import math
from collections.abc import Iterable, Mapping

import paddle
from paddle import nn

from ...formats.safetensors import TensorInfo
from ...utils.errors import CheckpointError, report
from ..recipe.load import Optim
from .checkpoints import array_of

MASTER = "master"
SEPARATOR = "//"  # between a parameter's name and the kind of its state


def trained(model: nn.Layer) -> dict[str, paddle.Tensor]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.stop_gradient}


class AdamW(paddle.optimizer.AdamW):
    """Its gradients are given back after a step. Paddle keeps them as zeros by default: their memory through the next
    forward pass, and an addition to them for each weight in the backward pass."""

    def clear_grad(self, set_to_zero: bool = False) -> None:
        super().clear_grad(set_to_zero)


def adamw(model: nn.Layer, optim: Optim, schedule) -> AdamW:
    """AdamW over what is trained. Weight decay acts on matrices, as is usual: not on the weights of norms.

    Gradients are clipped by the caller of step(), which knows all ranks. Half-precision weights get float32 twins.
    """
    parameters = trained(model)
    decayed = {parameter.name for parameter in parameters.values() if parameter.ndim > 1}
    return AdamW(
        learning_rate=schedule,
        beta1=optim.betas[0],
        beta2=optim.betas[1],
        epsilon=optim.eps,
        parameters=list(parameters.values()),
        weight_decay=optim.weight_decay,
        apply_decay_param_fun=lambda name: name in decayed,
        multi_precision=True,
    )


def innermost(optimizer) -> paddle.optimizer.Optimizer:
    """The AdamW within Fleet's wrappers."""
    while hasattr(optimizer, "_inner_opt"):
        optimizer = optimizer._inner_opt
    return optimizer


def updated_here(model: nn.Layer, optimizer) -> dict[str, paddle.Tensor]:
    """The parameters that this rank updates, by name: all, or with sharding stage 1 its part."""
    parameters = trained(model)
    wrapper = optimizer
    while hasattr(wrapper, "_inner_opt"):
        if hasattr(wrapper, "_rank2params"):
            mine = {parameter.name for parameter in wrapper._rank2params[wrapper._sharding_rank]}
            return {name: parameter for name, parameter in parameters.items() if parameter.name in mine}
        wrapper = wrapper._inner_opt
    return parameters


# Paddle's state_dict() of an optimizer names tensors by counters of the process that made them; a process that has
# built another model before counts on. These two go to the tensors themselves.


def state_of(model: nn.Layer, optimizer) -> dict[str, paddle.Tensor]:
    """This rank's state by name//kind: moments, powers of the betas, master weights."""
    inner = innermost(optimizer)
    found: dict[str, paddle.Tensor] = {}
    for name, parameter in updated_here(model, optimizer).items():
        master = inner._master_weights.get(parameter.name)
        key = parameter.name if master is None else master.name
        kinds = {kind: tensors[key] for kind, tensors in inner._accumulators.items() if key in tensors}
        kinds |= {} if master is None else {MASTER: master}
        found |= {name + SEPARATOR + kind: tensor for kind, tensor in kinds.items()}
    return found


def load_state(model: nn.Layer, optimizer, stored: Mapping[str, TensorInfo]) -> None:
    """Fill this rank's state from what any ranks stored. Raises CheckpointError naming all that is not there."""
    inner = innermost(optimizer)
    inner._create_accumulators(
        paddle.base.framework.default_main_program().global_block(), list(updated_here(model, optimizer).values())
    )
    own = state_of(model, optimizer)
    findings = [f"missing     {name}" for name in own if name not in stored]
    findings += [
        f"shape       {name}: stored {list(stored[name].shape)}, here {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in stored and list(stored[name].shape) != list(tensor.shape)
    ]
    if findings:
        raise CheckpointError(report("The checkpoint's optimizer does not fit:", findings, "Was the recipe changed?"))
    for name, tensor in own.items():
        tensor.set_value(paddle.to_tensor(array_of(stored[name]), place=tensor.place))


def gradients(parameters: Iterable[paddle.Tensor]) -> list[paddle.Tensor]:
    """The gradients there are; float32 ones where mixed precision keeps such."""
    found = (p.main_grad if getattr(p, "main_grad", None) is not None else p.grad for p in parameters)
    return [gradient for gradient in found if gradient is not None]


def squared_norm(tensors: Iterable[paddle.Tensor]) -> paddle.Tensor:
    """The sum of squares as a float64 scalar. (Paddle's own norm() of float32 is off in the fourth digit.)"""
    total = paddle.zeros([], "float64")
    for tensor in tensors:
        values = tensor.astype("float32")
        total += (values * values).sum().astype("float64")
    return total


def clip_factor(norm: float, clip: float) -> float:
    """By what gradients of this global norm are multiplied; clip 0: never."""
    return clip / norm if clip and math.isfinite(norm) and norm > clip else 1.0
