"""One adapter as it comes: low-rank pairs by global expert, before a table stores them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..checks import FLOATS, expect_bool, expect_instance, expect_int, expect_number

PROJECTIONS = ("gate", "up", "gate_up", "down")


def lora_scaling(alpha: float, rank: int, *, rank_stabilized: bool = False) -> float:
    """What multiplies B A: alpha / r (LoRA, arXiv 2106.09685), or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732).

    Raises:
        TypeError, ValueError: an alpha that is not finite, or a rank under 1, by name.
    """
    expect_number("alpha", alpha)
    expect_int("rank", rank, low=1)
    expect_bool("rank_stabilized", rank_stabilized)
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


@dataclass(frozen=True, eq=False)
class LowRank:
    """What an adapter adds to one matrix of one expert: `scale * b @ a`.

    Attributes:
        a: `[r, K]`.
        b: `[N, r]` of the same dtype.
        scale: as `lora_scaling` gives it.

    Raises:
        TypeError, ValueError: no tensors of two dimensions, different ranks or dtypes, or a scale that is not finite.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, tensor in (("a", self.a), ("b", self.b)):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}: an A needs its B")
            if tensor.ndim != 2 or tensor.dtype not in FLOATS or tensor.layout is not torch.strided:
                raise ValueError(
                    f"{name}: expected two dimensions of bfloat16, float16 or float32, got {list(tensor.shape)} "
                    f"{tensor.dtype} {tensor.layout}"
                )
        if self.a.dtype != self.b.dtype:
            raise TypeError(f"b: expected the dtype of a, {self.a.dtype}, got {self.b.dtype}")
        if self.a.shape[0] != self.b.shape[1] or self.a.shape[0] < 1:
            raise ValueError(f"b: expected the rank of a, {self.a.shape[0]} (at least 1), got {self.b.shape[1]}")
        expect_number("scale", self.scale)

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter of a layer's experts, by global expert id; an expert that is left out is not adapted.

    Attributes:
        gate: of w13's gate rows, b is `[I, r]`; of all of w13's rows where the activation is not gated.
        up: of w13's up rows.
        gate_up: of gate and up together, which share one A: b is `[2I, r]` in the order of w13's rows. An expert has
            this or the two others.
        down: of w2, a is `[r, I]` and b `[H, r]`.
        num_experts: E of the model that it was trained for; None where that is not known.

    Raises:
        TypeError, ValueError: no mapping of experts to pairs, or no number of experts, by name.
    """

    gate: Mapping[int, LowRank] = field(default_factory=dict)
    up: Mapping[int, LowRank] = field(default_factory=dict)
    gate_up: Mapping[int, LowRank] = field(default_factory=dict)
    down: Mapping[int, LowRank] = field(default_factory=dict)
    num_experts: int | None = None

    def __post_init__(self) -> None:
        if self.num_experts is not None:
            expect_int("num_experts", self.num_experts, low=1)
        for projection in PROJECTIONS:
            pairs = expect_instance(projection, getattr(self, projection), Mapping)
            for expert, low_rank in pairs.items():
                expect_int(f"{projection}'s expert", expert, low=0)
                expect_instance(f"{projection}[{expert}]", low_rank, LowRank)

    def entries(self) -> Iterator[tuple[str, int, LowRank]]:
        """Every pair: its projection's name, its global expert, and itself."""
        for projection in PROJECTIONS:
            for expert, low_rank in getattr(self, projection).items():
                yield projection, expert, low_rank

    @property
    def largest_rank(self) -> int:
        """Of all pairs; 0 for an adapter that adapts nothing."""
        return max((low_rank.rank for _, _, low_rank in self.entries()), default=0)
