"""What the tables of public calls are made of, and small operands for them.

`public_layers.py`, `public_values.py` and `public_files.py` have a call that is right for every public function and
class of the implementation, and say what its arguments may be; `test_bad_input.py` makes the bad calls from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from moegate.conformance.properties.bad_input import Arguments, Bad, Kind, bad_arguments
from moegate.impl.config import MoEConfig
from moegate.impl.experts_module import RoutedExperts
from moegate.impl.layer import Gate, MoELayer, RoutingMethod
from moegate.impl.lora.adapter import Adapter, LowRank
from moegate.impl.lora.table import AdapterTable

M, H, I, E, K = 4, 32, 16, 4, 2


@dataclass(frozen=True)
class PublicCall:
    """A public function with arguments that are right.

    Attributes:
        name: below `moegate.impl`; methods as `lora.table.AdapterTable.load`, with the object as `self`.
        call: the function.
        good: makes arguments that it accepts.
        kinds: what its arguments may be.
        rows: what the arguments only together say wrong.
        needs: what the right call needs that a test of one process has not; empty where nothing.
    """

    name: str
    call: Callable[..., Any]
    good: Callable[[], Arguments]
    kinds: Mapping[str, Kind]
    rows: Sequence[Bad] = field(default_factory=tuple)
    needs: str = ""

    @property
    def bad(self) -> list[Bad]:
        """Every bad call."""
        return [*bad_arguments(self.kinds), *self.rows]


def entered(manager: AbstractContextManager[Any]) -> None:
    """A block with nothing in it."""
    with manager:
        pass


def full(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(shape, 0.125, dtype=dtype)


def weights() -> Arguments:
    return {"w13": full(E, 2 * I, H), "w2": full(E, H, I)}


def routed() -> RoutedExperts:
    return RoutedExperts(**weights())


def layer(**options: Any) -> MoELayer:
    return MoELayer(Gate(full(E, H)), routed(), RoutingMethod(K), **options)


def table(loaded: bool = False, **options: Any) -> AdapterTable:
    made = AdapterTable(2, 4, num_experts=E, hidden_size=H, intermediate_size=I, device="cpu", **options)
    if loaded:
        made.load(adapter(), 1)
    return made


def low_rank(n: int = I, k: int = H, rank: int = 2) -> LowRank:
    return LowRank(full(rank, k), full(n, rank))


def adapter() -> Adapter:
    return Adapter(gate={0: low_rank()}, down={1: low_rank(H, I)}, num_experts=E)


def config(**changes: Any) -> MoEConfig:
    return MoEConfig(**{"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 32} | changes)
