"""What a subject declares about its arithmetic: where it rounds, to what, and what it accumulates in.

The error budget is a function of the declaration, so a declaration is a promise: a looser one hides faults, a tighter
one raises false alarms. `declarations.json` holds those of the subjects that ship here, with a reason for each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Rounding = Literal["storage", "float32"]
"""`storage`: rounded to the dtype of the activations. `float32`: kept in float32."""


@dataclass(frozen=True)
class Numerics:
    """The rounding points of one MoE implementation.

    Attributes:
        gate_up: the result of the first GEMM, before the activation reads it.
        gate: the activated gate, before it is multiplied by up.
        hidden: the activation's result, which the second GEMM reads.
        expert_output: the second GEMM's result before a routing weight multiplies it.
        weighted: the expert's output times its routing weight, before the sum over the top-k.
        combine: the running sum over the top-k.
        routing_weight: the routing weight itself, before it is used.
        shrunk: what a LoRA adapter's A gives, before its B takes it.
        dequantized_weight: a weight of few bits times its scale, before a GEMM whose other operand is not quantised.
        input_precision: how the GEMMs read float32 operands: as they are, or rounded to TF32.
        accumulator: what fp8 products are summed in: float32, or the shorter sums of Hopper's tensor cores.
        promoted_every: products after which such a short sum enters a float32 one; 0 never.
        repeatable: the same call gives the same bits.
        permutation_invariant: a token's bits do not depend on its place in the batch.
    """

    gate_up: Rounding = "storage"
    gate: Rounding = "float32"
    hidden: Rounding = "storage"
    expert_output: Rounding = "float32"
    weighted: Rounding = "storage"
    combine: Rounding = "float32"
    routing_weight: Rounding = "float32"
    shrunk: Rounding = "storage"
    dequantized_weight: Rounding = "float32"
    input_precision: Literal["ieee", "tf32"] = "ieee"
    accumulator: Literal["float32", "hopper_fp8"] = "float32"
    promoted_every: int = 0
    repeatable: bool = True
    permutation_invariant: bool = False

    def tightened(self, step: str) -> Numerics:
        """The same declaration with one rounding point promised away."""
        if getattr(self, step) != "storage":
            raise ValueError(f"step: expected a point that rounds to storage, got {step} = {getattr(self, step)}")
        return replace(self, **{step: "float32"})


@dataclass(frozen=True)
class Format:
    """A binary floating-point format as rounding sees it."""

    unit_roundoff: float
    half_smallest_subnormal: float
    smallest_normal: float

    @staticmethod
    def of(dtype: torch.dtype) -> Format:
        """The format of a torch dtype, for rounding to nearest."""
        info = torch.finfo(dtype)
        return Format(info.eps / 2, info.smallest_normal * info.eps / 2, info.smallest_normal)


FLOAT32 = Format.of(torch.float32)
TF32_UNIT_ROUNDOFF = 2.0**-11
# Hopper's fp8 tensor cores keep about 14 bits of a running sum (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
HOPPER_FP8_UNIT_ROUNDOFF = 2.0**-13
# Products that one of their instructions adds before it cuts the sum.
HOPPER_FP8_STEP = 32


def format_of(rounding: Rounding, storage: torch.dtype) -> Format:
    """The format that a declared rounding means for activations of dtype `storage`."""
    return Format.of(storage) if rounding == "storage" else FLOAT32
