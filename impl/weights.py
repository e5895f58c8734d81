"""The parameters of one layer's experts on one rank, as every backend takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import QuantScheme
from .quantization import ExpertsQuantization


@dataclass(frozen=True, eq=False)
class ExpertsWeights:
    """Checked by whoever makes one (`fused_experts`, `batched_experts`).

    Attributes:
        w13: `[E_local, 2I, H]` (I rows for an activation that is not gated), int4 `[E_local, 2I, H / 2]`.
        w2: `[E_local, H, I]`, int4 `[E_local, H, I / 2]`.
        w13_bias: `[E_local, 2I]` in the order of w13's rows, or None.
        w2_bias: `[E_local, H]` or None.
        quant: how w13 and w2 are stored; None where they are of the activations' dtype.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    quant: ExpertsQuantization | None = None

    @property
    def scheme(self) -> QuantScheme:
        """How they are quantised."""
        return QuantScheme.NONE if self.quant is None else self.quant.scheme

    @property
    def block_shape(self) -> tuple[int, int] | None:
        """Of their scales."""
        return None if self.quant is None else self.quant.block_shape

    @property
    def num_local_experts(self) -> int:
        """E_local."""
        return self.w2.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.w2.shape[1]

    @property
    def intermediate_size(self) -> int:
        """I of this rank."""
        return self.w2.shape[2] * (2 if self.scheme is QuantScheme.INT4_W4A16 else 1)
