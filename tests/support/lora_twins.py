"""The same adapters in peft and in aquila_pd, and what both compute."""

import numpy as np
import paddle
import torch
import twins
from peft import LoraConfig, get_peft_model

from aquila_pd.adapters.lora import attach, load_adapter_state
from aquila_pd.sft.recipe.load import LoraSpec

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


KINDS = {"lora": {}, "rslora": dict(rslora=True), "dora": dict(dora=True)}


def spec(**changes) -> LoraSpec:
    return LoraSpec(**{**dict(r=4, alpha=6.0, dropout=0.0, targets=ALL), **changes})


def peft_model(base, asked: LoraSpec):
    """peft's adapters with random values on a torch model: B is not zero, so that both factors have gradients."""
    config = LoraConfig(
        r=asked.r,
        lora_alpha=asked.alpha,
        lora_dropout=asked.dropout,
        target_modules=list(asked.targets),
        use_rslora=asked.rslora,
        use_dora=asked.dora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif "magnitude" in name:  # no longer the lengths of the base's columns
                parameter.mul_(0.7 + 0.6 * torch.rand_like(parameter))
    return model


def to_ours(name: str, tensor: torch.Tensor) -> tuple[str, np.ndarray]:
    """Our name and layout of one of peft's parameters, written by hand."""
    name = name.replace("base_model.model.model.", "aquila.").replace(".default", "").removesuffix(".weight")
    array = tensor.detach().numpy()
    if name.endswith("lora_magnitude_vector"):
        return name.replace("lora_magnitude_vector", "magnitude"), array
    return name, array.T


def theirs_as_ours(model, *, gradients: bool = False) -> dict[str, np.ndarray]:
    named = [(n, p.grad if gradients else p) for n, p in model.named_parameters() if p.requires_grad]
    return dict(to_ours(name, tensor) for name, tensor in named)


def pair(asked: LoraSpec):
    """The same model with the same adapters in torch and in Paddle."""
    base, ours = twins.pair()
    theirs = peft_model(base, asked)
    attach(ours, asked)
    load_adapter_state(ours, theirs_as_ours(theirs))
    return theirs, ours


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits


def our_logits(model, ids):
    with paddle.no_grad():
        return model(paddle.to_tensor(ids), return_dict=True).logits


def our_loss(model, ids):
    return model(paddle.to_tensor(ids), labels=paddle.to_tensor(twins.shifted(ids)), return_dict=True).loss
