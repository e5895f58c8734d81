"""A wrong kernel is never timed: the judges that a kernel must pass first.

This is the one place where benchmarks meet conformance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..conformance.verify import ExpertsVerdict, verify_experts
from .operands import ExpertsCall, Operands

_BUDGET_TOKENS = 64
# The largest error of a row, as ||out - right|| / ||right||, that is taken for rounding: several times what the
# engines' kernels show (0.0043 in bf16), and far under what a lost expert or scale does.
_ROW_ERROR = {torch.bfloat16: 0.015, torch.float16: 0.002, torch.float32: 1e-4}


class Verdict(Protocol):
    """What a judge says."""

    @property
    def holds(self) -> bool:
        """Whether the subject is right."""
        ...

    @property
    def budget_used(self) -> float:
        """The largest error over what is allowed: at most one where it holds."""
        ...


Verify = Callable[[ExpertsCall, Operands], Verdict]
"""A judge: runs the subject on the operands, and says whether its result is right."""


class WrongKernelError(RuntimeError):
    """A kernel that was about to be timed computes something else."""


@dataclass(frozen=True)
class RowErrorVerdict:
    """Whether each row of an output is near the plain one.

    Attributes:
        holds: every row is.
        budget_used: the largest row error over the largest one allowed; infinite for NaN and infinities.
    """

    holds: bool
    budget_used: float


def verify_by_budget(experts: ExpertsCall, operands: Operands) -> ExpertsVerdict:
    """Judge the output as conformance does: within the error budget derived for the numerics that moegate declares.

    At most `_BUDGET_TOKENS` tokens, spread evenly over the batch, since the budget is worked out in float64.

    Raises:
        ValueError: another activation than silu.
    """
    if operands.activation != "silu":
        raise ValueError(f"activation: expected silu, got {operands.activation!r}")
    return verify_experts(
        operands.pass_to(experts),
        operands.hidden_states,
        operands.w13,
        operands.w2,
        operands.topk_weights,
        operands.topk_ids,
        expert_map=operands.expert_map,
        max_tokens=_BUDGET_TOKENS,
    )


def verify_rows(experts: ExpertsCall, operands: Operands) -> RowErrorVerdict:
    """Judge all rows against the layer in plain torch, expert by expert and in a higher precision.

    It needs no declaration of the subject's numerics, so it judges peers too, and it is fast enough for every row of
    every graph; its allowance per dtype is fixed.
    """
    return judge_rows(operands.pass_to(experts), plain_experts(operands), operands.hidden_states.dtype)


def judge_rows(out: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> RowErrorVerdict:
    """Judge an output that should be of `dtype` against the right one, `[M, H]` in a higher precision."""
    if out.shape != right.shape or out.dtype != dtype:
        return RowErrorVerdict(False, float("inf"))
    error = torch.linalg.vector_norm(out.to(right.dtype) - right, dim=1)
    size = torch.linalg.vector_norm(right, dim=1)
    # A row without any expert on this rank is zero, and must be exactly that.
    relative = torch.where(size > 0, error / size, torch.where(error == 0, 0.0, float("inf")))
    used = float(torch.nan_to_num(relative, nan=float("inf")).max()) / _ROW_ERROR[dtype]
    return RowErrorVerdict(used <= 1, used)


def plain_experts(operands: Operands) -> torch.Tensor:
    """`[M, H]`: the layer in float64 for float32 operands, else in float32.

    Raises:
        ValueError: another activation than silu.
    """
    if operands.activation != "silu":
        raise ValueError(f"activation: expected silu, got {operands.activation!r}")
    x = operands.hidden_states
    precise = torch.float64 if x.dtype == torch.float32 else torch.float32
    ids = operands.topk_ids.long()
    if operands.expert_map is not None:
        ids = torch.where(ids >= 0, operands.expert_map.long()[ids.clamp(min=0)], -1)
    out = torch.zeros(x.shape, dtype=precise, device=x.device)
    for expert in torch.unique(ids[ids >= 0]).tolist():
        rows, slots = torch.where(ids == expert)
        gate_up = x[rows].to(precise) @ operands.w13[expert].to(precise).T
        gate, up = gate_up.chunk(2, dim=1)
        result = (torch.nn.functional.silu(gate) * up) @ operands.w2[expert].to(precise).T
        out.index_add_(0, rows, result * operands.topk_weights[rows, slots, None].to(precise))
    return out
