"""A wrong kernel is never timed: the judges that a kernel must pass first.

This is the one place where benchmarks meet conformance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..conformance.numerics import Numerics
from ..conformance.subjects.moegate import MoegateSubject
from ..conformance.verify import ExpertsVerdict, verify_experts
from ..conformance.words import reference_arguments
from ..impl.config import QuantScheme
from .operands import ExpertsCall, Operands
from .plain import plain_experts

_BUDGET_TOKENS = 64
# The largest error of a row, as ||out - right|| / ||right||, that is taken for rounding: several times what the
# engines' kernels show (0.0043 in bf16), and far under what a lost expert or scale does.
_ROW_ERROR = {torch.bfloat16: 0.015, torch.float16: 0.002, torch.float32: 1e-4}
# Where activations are quantised, contenders that round elsewhere put some hidden values one step up or down: of fp8
# an eighth of the value for 1 in some 30, of int8 1 / 127 of the row's largest for 1 in 10.
_ROW_ERROR_QUANTIZED = {QuantScheme.FP8_W8A8: 0.06, QuantScheme.INT8_W8A8: 0.03}


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


def verify_by_budget(
    experts: ExpertsCall, operands: Operands, *, numerics: Numerics = MoegateSubject.numerics
) -> ExpertsVerdict:
    """Judge the output as conformance does: within the error budget derived for the numerics that a subject declares.

    At most `_BUDGET_TOKENS` tokens, spread evenly over the batch, since the budget is worked out in float64.
    """
    words = reference_arguments(
        operands.w13,
        operands.w2,
        w13_bias=operands.w13_bias,
        w2_bias=operands.w2_bias,
        quant=operands.quant,
        activation=operands.activation,
        interleaved=operands.interleaved,
        adapters=operands.adapters,
        lora_ids=operands.lora_ids,
    )
    return verify_experts(
        operands.pass_to(experts),
        operands.hidden_states,
        topk_weights=operands.topk_weights,
        topk_ids=operands.topk_ids,
        expert_map=operands.expert_map,
        numerics=numerics,
        max_tokens=_BUDGET_TOKENS,
        **words,
    )


def verify_reduced(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> ExpertsVerdict:
    """Judge the output of a layer that ranks share, for tokens of one of them, with the weights of all.

    The ranks' parts of a token's sum are added in the activations' dtype, at most as often as it has experts. At most
    `_BUDGET_TOKENS` tokens are judged.
    """
    numerics = replace(MoegateSubject.numerics, combine="storage")
    operands = (output, hidden_states, w13, w2, topk_weights, topk_ids)
    return verify_experts(*operands, numerics=numerics, max_tokens=_BUDGET_TOKENS)


def verify_rows(experts: ExpertsCall, operands: Operands) -> RowErrorVerdict:
    """Judge all rows against the layer in plain torch, expert by expert and in a higher precision.

    It needs no declaration of the subject's numerics, so it judges peers too, and it is fast enough for every row of
    every graph; its allowance per format is fixed.
    """
    scheme = QuantScheme.NONE if operands.quant is None else operands.quant.scheme
    return judge_rows(operands.pass_to(experts), plain_experts(operands), operands.hidden_states.dtype, scheme)


def judge_rows(
    out: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, scheme: QuantScheme = QuantScheme.NONE
) -> RowErrorVerdict:
    """Judge an output that should be of `dtype` against the right one, `[M, H]` in a higher precision.

    Args:
        out: of the contender.
        right: the right one.
        dtype: that `out` should have.
        scheme: how weights are stored; where activations are quantised, more is allowed.
    """
    if out.shape != right.shape or out.dtype != dtype:
        return RowErrorVerdict(False, float("inf"))
    error = torch.linalg.vector_norm(out.to(right.dtype) - right, dim=1)
    size = torch.linalg.vector_norm(right, dim=1)
    # A row without any expert on this rank is zero, and must be exactly that.
    relative = torch.where(size > 0, error / size, torch.where(error == 0, 0.0, float("inf")))
    used = float(torch.nan_to_num(relative, nan=float("inf")).max())
    used /= _ROW_ERROR_QUANTIZED.get(scheme, _ROW_ERROR[dtype])
    return RowErrorVerdict(used <= 1, used)
