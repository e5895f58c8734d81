"""moegate's calls as replays of earlier ones: a subject of its own, as `moegate` runs each call as it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...impl.fused_moe import fused_experts
from ...impl.path import record_path
from ...impl.quantization import ExpertsQuantization
from ...impl.replay import replaying
from ...impl.routing import select_experts
from ..cases import ExpertsCase, RoutingCase
from .moegate import MoegateSubject, experts_arguments, routing_arguments

_ROW_PADDING = 16
# Arguments whose rows may be further apart.
_STRIDED = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids", "router_logits")
# In every byte: a large positive number in each format, where a poisoned allocation is NaN or, as an integer, negative.
_LEFT_OVER = 0x7F
# What else could stand in an argument's place.
_OTHER_VALUES = {
    "activation": {"silu": "gelu", "gelu": "silu", "silu_no_mul": "gelu_no_mul", "gelu_no_mul": "silu_no_mul"},
    "renormalize": {False: True, True: False},
}


class _UsedMemory(TorchDispatchMode):
    """What a replay takes without a value has held other values before, where it is not poisoned.

    A recorded call may count on zeros that it asked for, and fresh memory is often zero.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it as it stands; fill what it took."""
        del types
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.empty and not torch.are_deterministic_algorithms_enabled():
            result.untyped_storage().fill_(_LEFT_OVER)
        return result


def elsewhere(tensor: Tensor, strides: Sequence[int] | None = None, alignment: int | None = None) -> Tensor:
    """The tensor's rows in another order and in other memory.

    Args:
        tensor: of any form.
        strides: in elements; None: the same.
        alignment: bytes between its start and a multiple of 16; None: the same.
    """
    strides = tensor.stride() if strides is None else tuple(strides)
    if not tensor.numel() or 0 in strides:
        return tensor
    size = tensor.element_size()
    span = sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True)) + 1
    memory = torch.empty(span * size + 16, dtype=torch.uint8, device=tensor.device)
    start = (tensor.data_ptr() if alignment is None else alignment) % 16 // size
    other = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    other.set_(memory.untyped_storage(), start, tensor.shape, strides)
    # Not every operation knows 8-bit floats.
    stored, given = (t.view(torch.uint8) if size == 1 else t for t in (other, tensor))
    stored.copy_(given.roll(1, 0) if given.ndim else given)
    return other


def _further_apart(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the same tensor with rows that are padded."""
    *outer, rows, last = tensor.stride()
    factor = rows + _ROW_PADDING
    return (*(stride // max(rows, 1) * factor for stride in outer), factor, last)


def _others(value: Any) -> Any:
    if isinstance(value, Tensor):
        return elsewhere(value)
    if isinstance(value, ExpertsQuantization):
        tensors = {name: tensor for name, tensor in value.tensors().items() if tensor is not None}
        return replace(value, **{name: elsewhere(tensor) for name, tensor in tensors.items()})
    return value


def _neighbours(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same call but for one thing by which forms differ."""
    for name, value in arguments.items():
        if name in _OTHER_VALUES and value in _OTHER_VALUES[name]:
            yield arguments | {name: _OTHER_VALUES[name][value]}
        if isinstance(value, Tensor) and name in _STRIDED and value.numel() and 0 not in value.stride():
            yield arguments | {name: elsewhere(value, _further_apart(value))}
            if value.data_ptr() % 16:
                yield arguments | {name: elsewhere(value, alignment=0)}
    ids = arguments.get("topk_ids")
    if ids is not None:
        yield arguments | {"topk_ids": ids.to(torch.int64 if ids.dtype is torch.int32 else torch.int32)}


def _replayed(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls of other forms and one of the same, all recorded, and a replay on the tensors that are asked about."""
    with replaying(after=0):
        with record_path():  # whoever listens wants to hear of the call alone
            for neighbour in _neighbours(arguments):
                function(**neighbour)
            function(**{name: _others(value) for name, value in arguments.items()})
            states = arguments.get("hidden_states")
            if states is not None and states.is_cuda and arguments.get("quant") is None:
                # Last, as the plan before it is of tensors that loads of 16 bytes may read: here they would trap.
                function(**arguments | {"hidden_states": elsewhere(states, alignment=states.element_size())})
        with _UsedMemory():
            return function(**arguments)


class MoegateReplayedSubject(MoegateSubject):
    """`fused_experts` and `select_experts` under `replaying`, after calls of the same form and of others."""

    name = "moegate:replayed"
    variants = ("triton",)

    def facets(self, variant: str) -> tuple[str, ...]:
        """What is replayed, and its path."""
        del variant
        return ("experts", "route", "trace", "launches")

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """`fused_experts`."""
        return _replayed(fused_experts, experts_arguments(case, variant))

    def route(self, case: RoutingCase, variant: str) -> tuple[Tensor, Tensor]:
        """`select_experts`."""
        return _replayed(select_experts, routing_arguments(case, variant))
