"""Triton launches on the current device; operands may live on another."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_HERE = nullcontext()


def current_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which the tensor's device is the current one; free where it already is, and on the CPU."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _HERE
