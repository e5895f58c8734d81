"""NUM, of sizes beyond 32 bits: an offset that is computed in 32 bits is right on every small case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..budget import experts_budget
from ..cases import ExpertsCase
from ..judge import Verdict, declare
from ..numerics import Numerics
from .num import judge_values

FAR_APART = declare(
    "NUM-06",
    "operands whose rows or experts lie more than 2^31 elements apart give the bits of dense ones",
    "experts",
    needs=lambda can: can.padded_rows,
)
MANY_ROWS = declare(
    "NUM-07",
    "the last tokens of a batch whose intermediate rows have more than 2^31 elements are within their budget",
    "experts",
    devices=("cuda",),
)
# A stride: three rows of it span more than 2^31 elements. One of 2^31 would be 64-bit by itself, and hide the fault.
STRIDE = (1 << 30) + 16
# Operands, and how many of their leading axes are far apart: rows, or experts with dense rows.
OPERANDS = ("hidden_states", "topk_weights", "topk_ids", "w13", "w2", "w13_bias", "w2_bias")
JUDGED_TOKENS = 64


def far_apart(values: Tensor) -> Tensor:
    """A copy whose first axis has a stride of STRIDE, and whose others are dense; what lies between is not touched."""
    dense = list(torch.empty(values.shape[1:], device="meta").stride())
    span = 1 + (len(values) - 1) * STRIDE + sum((n - 1) * s for n, s in zip(values.shape[1:], dense, strict=True))
    # Memory that nobody touches is never used, on a CPU.
    whole = torch.empty(span, dtype=values.dtype, device=values.device)
    return whole.as_strided(values.shape, (STRIDE, *dense)).copy_(values)


def judge_far_apart(case: ExpertsCase, operand: str, run: Callable[[ExpertsCase], Tensor]) -> list[Verdict]:
    """NUM-06 on one operand."""
    want = run(case)
    got = run(replace(case, **{operand: far_apart(getattr(case, operand))}))
    same = want.shape == got.shape and torch.equal(want.view(torch.int16), got.view(torch.int16))
    return [FAR_APART.verdict(same, f"{operand}, {STRIDE} elements apart: {int((want != got).sum())} elements differ")]


def judge_last_tokens(case: ExpertsCase, output: Tensor, numerics: Numerics) -> list[Verdict]:
    """NUM-07 on one output `[M, H]`."""
    rows = torch.arange(len(output) - JUDGED_TOKENS, len(output), device=output.device)
    call = case.operands().of_tokens(rows)
    trace = call.trace()
    verdicts = judge_values(call, output[rows], trace, experts_budget(trace, call, numerics))
    wrong = [f"{verdict.property.id}: {verdict.detail}" for verdict in verdicts if not verdict.holds]
    used = max(verdict.budget_used or 0.0 for verdict in verdicts)
    return [MANY_ROWS.verdict(not wrong, "; ".join(wrong), budget_used=used)]
