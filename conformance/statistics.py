"""How far an output is from the reference, in units of the budget: four statistics, each with its own limit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.experts import Trace
from ..reference.quantization import QuantizedWeight
from .budget import Budget, projected_error, rows_of_each_expert

# Rows beyond which the gains (which cost top_k times the second GEMM) are judged on the first rows alone.
MAX_GAIN_ELEMENTS = 1 << 27
# Columns by which rows are compared with each other, and numbers that are compared at a time.
COMPARED_COLUMNS, COMPARED_AT_ONCE = 32, 1 << 24


@dataclass(frozen=True)
class Statistics:
    """Errors in units of the budget; each is compared with its calibrated limit.

    Attributes:
        elementwise: `[M, H]`, (|error| - last rounding) / sigma, 0 where within the last rounding.
        row_rms: `[M]`, RMS error of a row over its RMS budget, which is wider the fewer causes a row's errors have.
        row_gain: `[M]`, |slope of the output on the reference - 1| over its standard error; NaN for a zero row.
        expert_gain: `[E_local]`, the same over all rows of an expert, along that expert's share; NaN without rows.
    """

    elementwise: Tensor
    row_rms: Tensor
    row_gain: Tensor
    expert_gain: Tensor


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator with 0 / 0 = 0 and x / 0 = inf."""
    return torch.where(numerator == 0, 0.0, numerator / denominator)


def _alike(trace: Trace, storage: torch.dtype, num_local: int) -> Tensor:
    """How many pairs of an expert round as each pair does, `[M, top_k]`, the pair itself included.

    Rows that differ by no more than roundings do (of tokens of zeros, or beside biases that are larger than all else)
    have errors of one sign: those of n such rows add up, where those of others average out. Two rows are alike where
    a quarter of some columns lie within two steps of each other, in the first GEMM's result or in the second's.
    """
    counts = torch.ones_like(trace.output_weights)
    two_steps = 4 * torch.finfo(storage).eps / 2
    for _, token, slot in rows_of_each_expert(trace, num_local):
        alike = torch.zeros(len(token), len(token), dtype=torch.bool, device=token.device)
        for rows in (trace.gate[token, slot], trace.expert_output[token, slot]):
            some = rows[:, :: max(1, rows.shape[1] // COMPARED_COLUMNS)][:, :COMPARED_COLUMNS]
            near = torch.zeros(alike.shape, dtype=torch.int64, device=token.device)
            for columns in some.split(max(1, COMPARED_AT_ONCE // max(1, alike.numel())), dim=1):
                differences = (columns[:, None] - columns[None, :]).abs()
                near += (differences <= two_steps * columns.abs()[:, None]).sum(dim=2)
            alike |= near >= some.shape[1] / 4
        counts[token, slot] = alike.sum(dim=1).to(counts.dtype).clamp(min=1)
    return counts


def statistics(output: Tensor, trace: Trace, budget: Budget, w2: Tensor | QuantizedWeight) -> Statistics:
    """The statistics of an output `[M, H]`; not-a-number counts as an infinite error."""
    error = (output.to(trace.output.dtype) - trace.output).nan_to_num(torch.inf, torch.inf, torch.inf)
    elementwise = _ratio((error.abs() - budget.last).clamp(min=0), budget.sigma)
    row_rms = _ratio((error**2).sum(dim=1).sqrt(), budget.of_row())

    top_k = trace.local_ids.shape[1]
    rows = max(1, MAX_GAIN_ELEMENTS // max(1, top_k * (top_k + 1) * max(trace.gate.shape[2], trace.output.shape[1])))
    part = Trace(*(getattr(trace, name)[:rows] for name in Trace.__dataclass_fields__))
    error = error[:rows]
    shares = part.output_weights[..., None] * part.expert_output  # [M, top_k, H]
    directions = torch.cat([part.output[:, None], shares], dim=1)
    allowed = projected_error(budget.first_rows(rows), part, w2, directions)
    along = torch.einsum("mdh,mh->md", directions, error)
    along = torch.where(directions.abs().sum(dim=2) == 0, 0.0, along)
    norm = (directions**2).sum(dim=2)

    # One flip is nobody's fault, whatever it costs; that there are several is a matter of chance.
    spread = (allowed.typical[:, 0] + (allowed.moved[:, :, 0] ** 2).sum(dim=0)).sqrt()
    sure = allowed.linear[:, 0] + allowed.single[:, 0].sqrt()
    row_gain = _ratio((along[:, 0].abs() - sure).clamp(min=0), spread)
    row_gain = torch.where(norm[:, 0] == 0, torch.nan, row_gain)
    num_local = w2.shape[0]
    ids = torch.where(part.local_ids < 0, num_local, part.local_ids).flatten()
    zeros = torch.zeros(num_local + 1, dtype=error.dtype, device=error.device)

    def of_experts(values: Tensor) -> Tensor:
        return zeros.index_add(0, ids, values.flatten())[:num_local]

    expert_norm = of_experts(norm[:, 1:])
    # What rows have in common adds up before it is squared.
    alike = _alike(part, output.dtype, num_local)
    expert_variance = of_experts(alike * allowed.typical[:, 1:])
    one_flip = zeros.scatter_reduce(0, ids, (alike * allowed.single[:, 1:].sqrt()).flatten(), "amax")[:num_local]
    for moved in allowed.moved:
        expert_variance = expert_variance + of_experts(moved[:, 1:]) ** 2
    sure = of_experts(allowed.linear[:, 1:]) + one_flip
    beyond = (of_experts(along[:, 1:]).abs() - sure).clamp(min=0)
    expert_gain = torch.where(expert_norm == 0, torch.nan, _ratio(beyond, expert_variance.sqrt()))
    return Statistics(elementwise, row_rms, row_gain, expert_gain)
