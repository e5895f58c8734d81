"""moegate's public calls: small operands for them, and all of them together.

The `moegate_public_*` files have a call that is right for every public function and class of the implementation, and
say what its arguments may be and what it must answer; `properties/public.py` makes the bad calls from them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ...impl.config import MoEConfig
from ...impl.experts_module import RoutedExperts
from ...impl.layer import Gate, MoELayer, RoutingMethod
from ...impl.lora.adapter import Adapter, LowRank
from ...impl.lora.table import AdapterTable
from ..properties.bad_input import Arguments

M, H, I, E, K = 4, 32, 16, 4, 2


def entered(manager: AbstractContextManager[Any]) -> None:
    """A block with nothing in it."""
    with manager:
        pass


def full(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of eighths."""
    return torch.full(shape, 0.125, dtype=dtype)


def weights() -> Arguments:
    """Of E experts."""
    return {"w13": full(E, 2 * I, H), "w2": full(E, H, I)}


def routed() -> RoutedExperts:
    """Experts of these weights."""
    return RoutedExperts(**weights())


def layer(**options: Any) -> MoELayer:
    """A layer of one rank."""
    return MoELayer(Gate(full(E, H)), routed(), RoutingMethod(K), **options)


def table(loaded: bool = False, **options: Any) -> AdapterTable:
    """Two slots, of which `loaded` fills the second."""
    made = AdapterTable(2, 4, num_experts=E, hidden_size=H, intermediate_size=I, device="cpu", **options)
    if loaded:
        made.load(adapter(), 1)
    return made


def low_rank(n: int = I, k: int = H, rank: int = 2) -> LowRank:
    """A pair of a rank."""
    return LowRank(full(rank, k), full(n, rank))


def adapter() -> Adapter:
    """Two pairs of two experts."""
    return Adapter(gate={0: low_rank()}, down={1: low_rank(H, I)}, num_experts=E)


def config(**changes: Any) -> MoEConfig:
    """A small layer's."""
    return MoEConfig(**{"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 32} | changes)


def uneven(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Numbers of which no two rows are equal."""
    count = torch.Size(shape).numel()
    return (torch.arange(count).view(shape) * 37 % 101 / 101 - 0.5).to(dtype)


def equals(expected: Any) -> Callable[[Any], str]:
    """The answer is this."""
    return lambda found: "" if found == expected else f"expected {expected}, got {found}"


def has(**expected: Any) -> Callable[[Any], str]:
    """The answer has these fields."""

    def wrong(found: Any) -> str:
        own = {name: getattr(found, name) for name in expected}
        return "" if own == expected else f"expected {expected}, got {own}"

    return wrong


def lists(expected: Any) -> Callable[[torch.Tensor], str]:
    """The answer is an int32 tensor of these numbers."""

    def wrong(found: torch.Tensor) -> str:
        right = found.dtype == torch.int32 and found.tolist() == expected
        return "" if right else f"expected {expected} in int32, got {found}"

    return wrong


def same_rows(make: Callable[[], torch.Tensor]) -> Callable[[torch.Tensor], str]:
    """The answer has the bits of what another call gives, which is made when it is needed."""

    def wrong(found: torch.Tensor) -> str:
        expected = make()
        same = found.shape == expected.shape and torch.equal(found, expected)
        return "" if same else f"expected {list(expected.shape)} {expected.flatten()[:4]}, got {list(found.shape)}"

    return wrong
