"""Low-rank adapters on experts: what they add to the two matrix products of a routed pair. Float64, pure torch.

Token t with adapter a uses W13[e] + s B13[a, e] A13[a, e] and W2[e] + s B2[a, e] A2[a, e] (LoRA, Hu et al. 2021, arXiv
2106.09685, section 4.1), with s = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732). Written
as what is added to the product, since A sees the activations before they are quantised and W13 and W2 may not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def scaling(alpha: float, rank: int, *, rank_stabilized: bool = False) -> float:
    """s: alpha / r, or alpha / sqrt(r)."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


@dataclass(frozen=True)
class LowRank:
    """One adapted matrix: `a [r, K]`, `b [N, r]` and s."""

    a: Tensor
    b: Tensor
    scale: float

    def weight(self, like: Tensor) -> Tensor:
        """s B A, `[N, K]` in the dtype of `like`."""
        return self.scale * (self.b.to(like.dtype) @ self.a.to(like.dtype))


@dataclass(frozen=True)
class Adapter:
    """One adapter; an expert that a mapping leaves out is not adapted there. Keys are indices of the weights held here.

    Attributes:
        gate_up: by expert, over all rows of w13 in w13's order (B is `[2I, r]`; where gate and up have an A of their
            own, two of these add up).
        down: by expert, over the rows of w2.
    """

    gate_up: Mapping[int, tuple[LowRank, ...]]
    down: Mapping[int, tuple[LowRank, ...]]


@dataclass(frozen=True)
class TokenAdapters:
    """The adapters of one call.

    Attributes:
        adapters: by number.
        lora_ids: `[M]`, which one each token has, -1 for none.
        sees_quantized: W13's A sees the input as W13 does, quantised and scaled back: that is all that is left of
            tokens that came from another rank in few bits.
    """

    adapters: Mapping[int, Adapter]
    lora_ids: Tensor
    sees_quantized: bool = False

    def added(self, projection: str, expert: int, token: Tensor, rows: Tensor) -> Tensor | float:
        """What the adapters of `token [P]` add to an expert's product with `rows [P, K]`, `[P, N]`; 0 for nothing."""
        total: Tensor | float = 0.0
        for index, adapter in self.adapters.items():
            mine = (self.lora_ids[token] == index)[:, None]
            for low_rank in getattr(adapter, projection).get(expert, ()):
                total = total + torch.where(mine, rows @ low_rank.weight(rows).T, 0.0)
        return total
