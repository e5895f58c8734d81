"""SHARED, the values: routed plus shared output within budget, on one stream or two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..budget import experts_budget
from ..calibration import limits
from ..evidence import evidence_of
from ..judge import Verdict, declare
from ..numerics import FLOAT32, Format, Numerics
from ..rounding import accumulation, rounding
from ..routing_budget import EXP_ROUNDOFFS
from ..shared_cases import SharedCase

ELEMENT = declare(
    "SHARED-13",
    "every element of routed plus shared output is within the sum of their budgets of the float64 reference",
    "shared",
    is_value=True,
)
UNSCALED = declare(
    "SHARED-14", "the shared output keeps its bits whatever the routed scaling factor is", "shared", is_value=True
)
INPUTS = declare("SHARED-15", "a layer with shared experts writes no operand and returns memory of its own", "shared")
REPEATABLE = declare("SHARED-16", "a layer with shared experts gives the same bits again", "shared")
OVERLAP = declare(
    "SHARED-17",
    "on a GPU, overlapped equals serial bit for bit, whatever either stream waits for at a hand-over",
    "shared",
    needs=lambda can: can.overlap,
    devices=("cuda",),
)

CALLERS = declare(
    "SHARED-18",
    "on a GPU, calls on two streams of the caller's keep their bits while each frees what the other is given",
    "shared",
    needs=lambda can: can.overlap,
    devices=("cuda",),
)

HELD = declare(
    "SHARED-19",
    "on a GPU, an overlapped call on a stream of the caller's ends while the default stream is held, with its bits",
    "shared",
    needs=lambda can: can.overlap,
    devices=("cuda",),
)

PLACES = ("before_fork", "before_shared", "after_shared", "before_routed", "after_routed")
"""Where a layer's streams may be held up: the input, the stream of the shared experts, and the caller's."""


@dataclass(frozen=True)
class SharedTruth:
    """The reference's answer and what an implementation may be off.

    Attributes:
        output: `[M, H]` float64.
        sigma: `[M, H]`, of all roundings but the last.
        last: `[M, H]`, of the last.
        is_quantized: activations of either part are, so that errors come in whole steps.
    """

    output: Tensor
    sigma: Tensor
    last: Tensor
    is_quantized: bool


def _gate_error(case: SharedCase, gate: Tensor) -> Tensor:
    """Relative error of a float32 sigmoid gate, `[M, 1]`, squared; 0 where there is none."""
    if case.gate is None:
        return torch.zeros_like(gate)
    x, weight = case.hidden_states.to(gate.dtype), case.gate[0].to(gate.dtype)
    u = FLOAT32.unit_roundoff
    logit = (x @ weight)[:, None]
    squares = (x**2 @ weight**2)[:, None]
    of_logit = accumulation(x.shape[1], logit, squares, u) + (u * EXP_ROUNDOFFS) ** 2 + (u * logit) ** 2
    return (1 - gate) ** 2 * of_logit + (u * EXP_ROUNDOFFS) ** 2


def truth_of(case: SharedCase, numerics: Numerics) -> SharedTruth:
    """What the reference says, and the budget around it: both outputs are rounded, and then their sum is."""
    routed, shared = case.operands()
    storage = Format.of(case.hidden_states.dtype)
    traces = routed.trace(), shared.trace()
    # The budget follows a routing weight of float32; the gate's own error is added here.
    budgets = (
        experts_budget(traces[0], routed, numerics),
        experts_budget(traces[1], replace(shared, topk_weights=shared.topk_weights.float()), numerics),
    )
    output = traces[0].output + traces[1].output
    variance = _gate_error(case, shared.topk_weights) * traces[1].output ** 2
    for budget in budgets:
        variance = variance + budget.sigma**2 + budget.last**2
    last = rounding(output, storage).sqrt()
    return SharedTruth(output, variance.sqrt(), last, any(budget.is_quantized for budget in budgets))


def judge_element(output: Tensor, truth: SharedTruth) -> list[Verdict]:
    """SHARED-13; nothing for a case without tokens."""
    if output.shape[0] == 0:
        return []
    error = (output.to(truth.output.dtype) - truth.output).nan_to_num(torch.inf, torch.inf, torch.inf).abs()
    beyond = (error - truth.last).clamp(min=0)
    used = torch.where(beyond == 0, 0.0, beyond / truth.sigma) / limits(truth.is_quantized).elementwise
    found = evidence_of(output, truth.output, used)
    holds = bool((used <= 1).all())
    return [ELEMENT.verdict(holds, found.text(), budget_used=float(used.max()), evidence=found)]


def differing_bytes(a: Tensor, b: Tensor) -> int:
    """How many bytes of two tensors differ; -1 where their shapes or dtypes do."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return -1
    return int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum()) if a.numel() else 0


def judge_unscaled(case: SharedCase, run: Callable[[SharedCase], Tensor]) -> list[Verdict]:
    """SHARED-14: with routing weights of zero only the shared output is left, and no factor may touch it."""
    if case.hidden_states.shape[0] == 0:
        return []
    routed = replace(case.routed, topk_weights=torch.zeros_like(case.routed.topk_weights))
    one = run(replace(case, routed=routed, routed_scaling_factor=1.0))
    other = run(replace(case, routed=routed, routed_scaling_factor=2.5))
    expected = case.operands()[1].trace().output
    stray = differing_bytes(one, other)
    # An output of zeros has no factor either: where the answer is not zero, the output may not be.
    nothing = bool((one == 0).all()) and bool((expected.abs() > Format.of(one.dtype).smallest_normal).any())
    return [UNSCALED.verdict(not stray and not nothing, f"{stray} bytes differ between the factors 1 and 2.5")]


def judge_memory(case: SharedCase, output: Tensor) -> Verdict:
    """SHARED-15."""
    written = case.changed()
    place = output.untyped_storage().data_ptr() if output.numel() else None
    held = [name for name, t in case.tensors().items() if t.numel() and t.untyped_storage().data_ptr() == place]
    return INPUTS.verdict(not written and not held, f"written: {written}; the result shares memory with: {held}")


def judge_again(output: Tensor, again: Tensor) -> Verdict:
    """SHARED-16."""
    differs = differing_bytes(output, again)
    return REPEATABLE.verdict(not differs, f"{differs} bytes differ between two calls")


def judge_overlap(serial: Tensor, overlapped: Tensor, delays: tuple[str, ...]) -> Verdict:
    """SHARED-17."""
    differs = differing_bytes(serial, overlapped)
    return OVERLAP.verdict(not differs, f"{differs} bytes differ, with delays {list(delays)}")


def judge_callers(serial: Tensor, overlapped: Tensor, turn: int) -> Verdict:
    """SHARED-18."""
    differs = differing_bytes(serial, overlapped)
    return CALLERS.verdict(not differs, f"{differs} bytes differ in call {turn} of two streams in turn")


def judge_held(serial: Tensor, overlapped: Tensor, ends: bool) -> Verdict:
    """SHARED-19."""
    differs = differing_bytes(serial, overlapped)
    late = "" if ends else "; the call ends only after the default stream goes on"
    return HELD.verdict(ends and not differs, f"{differs} bytes differ{late}")
