"""Whether a call of a torch module runs what its class wrote, and nothing that somebody hung on it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def runs_as_written(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` is `kind.forward` on its buffers.

    It is not for a subclass, with hooks on it or on all modules, with a `forward` of its own (as libraries set that
    move weights around a call), or with parameters in the place of buffers.

    Args:
        module: that would be called.
        kind: whose tensors are buffers.
    """
    return not (
        type(module) is not kind
        or "forward" in module.__dict__
        or module._parameters
        or module._forward_hooks
        or module._forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )
