"""How a model computes: its precision, torch.compile, and its copies on several ranks."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kamim import KamimError
from kamim.config.pretrain import Compute
from kamim.runtime.distributed import World


def parallel(model: nn.Module, compute: Compute, world: World) -> nn.Module:
    """Returns the module that the objective calls: the model, in DDP on several ranks, compiled if configured.

    Raises what uses_bf16 raises.
    """
    if uses_bf16(compute, world.device) and world.device.type == "cpu":
        _unfuse_attention(model)
    network: nn.Module = DistributedDataParallel(model) if world.size > 1 else model
    if should_compile(compute, world.device):
        network.compile()
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Compiled, sums over the one sample of a batch are views: gradients of class token, registers and
                # positions then share memory, which clipping, DDP and the next micro-batch would change twice.
                parameter.register_hook(torch.clone)
    return network


def _unfuse_attention(model: nn.Module) -> None:
    """Computes attention as two matrix products and a softmax: on a CPU the backward pass of torch's fused attention is
    slow in bf16 (54 % of a training step of vit_demo at 96 px)."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # of timm's attention modules
            module.fused_attn = False  # type: ignore[assignment]


def autocast(compute: Compute, device: torch.device) -> AbstractContextManager[None]:
    """Returns bf16 autocast or a null context. Raises what uses_bf16 raises."""
    return torch.autocast(device.type, torch.bfloat16) if uses_bf16(compute, device) else nullcontext()


def uses_bf16(compute: Compute, device: torch.device) -> bool:
    """Returns whether to compute in bf16. Raises KamimError if a GPU does not support the requested bf16."""
    lacks = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if lacks and compute.precision == "bf16":
        raise KamimError("compute.precision = 'bf16': this GPU does not compute in bf16; use compute.precision=fp32")
    auto = "bf16" if device.type == "cuda" and not lacks else "fp32"
    precision = auto if compute.precision == "auto" else compute.precision
    return precision == "bf16"


def should_compile(compute: Compute, device: torch.device) -> bool:
    """Returns whether to use torch.compile on this device."""
    return device.type == "cuda" if compute.compile == "auto" else compute.compile
