"""The derived error budget: how far an honest implementation may be from the float64 reference, element by element.

First-order rounding propagation through the layer. Every rounding contributes its largest error (unit roundoff times
magnitude, plus half the smallest subnormal); contributions are independent, so they add in quadrature; the last
rounding to the output's dtype is one known step and adds by itself:

    |out - reference| <= lambda * sigma + last,     sigma from these functions, lambda from `calibration.json`.

Pure functions of the reference's trace and the declared numerics. Sources: Higham, *Accuracy and Stability of
Numerical Algorithms*, ch. 3; Higham and Mary 2019 (SIAM J. Sci. Comput. 41(5), probabilistic rounding error analysis).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.activations import silu, silu_slope
from ..reference.experts import Trace
from .numerics import FLOAT32, TF32_UNIT_ROUNDOFF, Format, Numerics, format_of

# The largest curvature of silu, |silu''(0)| = 1/2: what first order leaves out where the slope is zero.
SILU_CURVATURE = 0.5
# float32 exp, reciprocal and product of a silu: unit roundoffs of the parts, in quadrature; GPUs' approximate exp is
# good to 2 ulp (CUDA C++ Programming Guide, "Intrinsic Functions").
SILU_ROUNDOFFS = 4.0


def rounding(values: Tensor, to: Format) -> Tensor:
    """Squared largest error of rounding `values` to a format."""
    return (to.unit_roundoff * values.abs() + to.half_smallest_subnormal) ** 2


def floor(values: Tensor, to: Format) -> Tensor:
    """Largest error of rounding values below the smallest normal, 0 elsewhere.

    There the error follows the value (all of it, where it becomes zero), so along a row it adds up instead of
    averaging out: the gains take it linearly.
    """
    return torch.where((values != 0) & (values.abs() < to.smallest_normal), to.half_smallest_subnormal, 0.0)


def accumulation(num_terms: int, total: Tensor, squares: Tensor, accumulator: Format) -> Tensor:
    """Squared error of summing `num_terms` products in an accumulator, in an order that nobody promised.

    Over random orders the i-th partial sum s_i has E[s_i^2] = i(K-i)/(K(K-1)) Q + i(i-1)/(K(K-1)) S^2, with S the sum
    and Q the sum of squares; each addition from the second on rounds its partial sum, and each product may be rounded.

    Args:
        num_terms: K.
        total: S, the exact sum.
        squares: Q, the sum of the squared terms.
        accumulator: the format of the running sum.
    """
    if num_terms < 2:
        return accumulator.unit_roundoff**2 * squares
    i = torch.arange(2, num_terms + 1, dtype=torch.float64)
    pairs = num_terms * (num_terms - 1)
    on_squares = float((i * (num_terms - i)).sum() / pairs)
    on_total = float((i * (i - 1)).sum() / pairs)
    return accumulator.unit_roundoff**2 * ((1 + on_squares) * squares + on_total * total**2)


@dataclass(frozen=True)
class Budget:
    """What the declared numerics allow around one reference output.

    Attributes:
        sigma: `[M, H]`, quadrature sum of all roundings but the last.
        last: `[M, H]`, the last rounding's largest error.
        hidden: `[M, top_k, I]`, squared, the part that all columns of a row share, as it stands at the second GEMM.
        hidden_common: `[M, top_k, I]`, the part of it that one rounding (of the weight on the input) causes everywhere.
        hidden_floor: `[M, top_k, I]`, the subnormal part of it.
        independent: `[M, H]`, squared, the part that each column has for itself.
        independent_floor: `[M, H]`, the subnormal part of it.
        weight_error: `[M, top_k]`, relative error of the routing weights where they are rounded on the output, else 0.
    """

    sigma: Tensor
    last: Tensor
    hidden: Tensor
    hidden_common: Tensor
    hidden_floor: Tensor
    independent: Tensor
    independent_floor: Tensor
    weight_error: Tensor

    def first_rows(self, rows: int) -> Budget:
        """The budget of the first tokens."""
        return Budget(*(getattr(self, name)[:rows] for name in self.__dataclass_fields__))


def _multiplicity(trace: Trace) -> Tensor:
    """How often a token lists the expert of each slot, `[M, top_k]`.

    The n shares of a repeated expert have the same error: its variance is n times that of n independent ones.
    """
    return (trace.local_ids[:, :, None] == trace.local_ids[:, None, :]).sum(dim=2).to(trace.output.dtype)


def _rows_of_each_expert(trace: Trace, num_local: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    for expert in range(num_local):
        token, slot = (trace.local_ids == expert).nonzero(as_tuple=True)
        if token.numel():
            yield expert, token, slot


def experts_budget(
    trace: Trace,
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    *,
    numerics: Numerics,
    apply_router_weight_on_input: bool = False,
) -> Budget:
    """The budget of `experts` for operands of one storage dtype; shapes as in the reference."""
    storage = hidden_states.dtype
    output = Format.of(storage)
    hidden_size, intermediate_size = w2.shape[1], w2.shape[2]
    tf32 = TF32_UNIT_ROUNDOFF if numerics.input_precision == "tf32" and storage == torch.float32 else 0.0
    wide = trace.output.dtype
    x_squared = hidden_states.to(wide) ** 2

    # First GEMM, where needed with the routing weight on its input (applied to the accumulator, one rounding).
    gate_up_squares = torch.zeros(*trace.gate.shape[:2], 2 * intermediate_size, dtype=wide, device=trace.gate.device)
    for expert, token, slot in _rows_of_each_expert(trace, w13.shape[0]):
        q = x_squared[token] @ (w13[expert].to(wide) ** 2).T
        if apply_router_weight_on_input:
            q = q * topk_weights[token, slot, None].to(wide) ** 2
        gate_up_squares[token, slot] = q
    gate_up = torch.cat([trace.gate, trace.up], dim=-1)
    at_gate_up = format_of(numerics.gate_up, storage)
    gate_up_variance = (
        accumulation(hidden_size, gate_up, gate_up_squares, FLOAT32)
        + 2 * tf32**2 * gate_up_squares
        + rounding(gate_up, at_gate_up)
    )
    gate_variance, up_variance = gate_up_variance.split(intermediate_size, dim=-1)
    gate_floor, up_floor = floor(gate_up, at_gate_up).split(intermediate_size, dim=-1)
    # What rounds a routing weight: its own conversion where declared, and the float32 product with it.
    weight_error = torch.full_like(trace.output_weights, FLOAT32.unit_roundoff)
    if numerics.routing_weight == "storage":
        absolute = topk_weights.to(wide).abs().clamp(min=output.half_smallest_subnormal)
        weight_error = weight_error + output.unit_roundoff + output.half_smallest_subnormal / absolute
    on_input = float(apply_router_weight_on_input)

    # Activation: the local slope, the curvature where the slope vanishes, its own float32 arithmetic, its roundings.
    activated = silu(trace.gate)
    at_gate, at_hidden = format_of(numerics.gate, storage), format_of(numerics.hidden, storage)
    gate_slope = silu_slope(trace.gate) * trace.up
    hidden_variance = (
        gate_slope**2 * gate_variance
        + (SILU_CURVATURE / 2 * gate_variance * trace.up) ** 2
        + activated**2 * up_variance
        + (FLOAT32.unit_roundoff * (SILU_ROUNDOFFS + trace.gate.abs()) * trace.hidden) ** 2
        + rounding(activated, at_gate) * trace.up**2
        + rounding(trace.hidden, at_hidden)
    )
    hidden_floor = (
        gate_slope.abs() * gate_floor
        + activated.abs() * up_floor
        + trace.up.abs() * floor(activated, at_gate)
        + floor(trace.hidden, at_hidden)
    )
    hidden_common = on_input * weight_error[..., None] * (gate_slope * trace.gate + trace.hidden)

    # Second GEMM and the weighted sum.
    shared = torch.zeros_like(trace.expert_output)
    squares = torch.zeros_like(trace.expert_output)
    for expert, token, slot in _rows_of_each_expert(trace, w2.shape[0]):
        exact = w2[expert].to(wide).T
        shared[token, slot] = hidden_variance[token, slot] @ exact**2 + (hidden_common[token, slot] @ exact) ** 2
        squares[token, slot] = trace.hidden[token, slot] ** 2 @ exact**2
    weights = trace.output_weights[..., None]
    weighted = weights * trace.expert_output
    present = (trace.local_ids >= 0)[..., None]
    at_output, at_weighted = format_of(numerics.expert_output, storage), format_of(numerics.weighted, storage)
    own = (
        accumulation(intermediate_size, trace.expert_output, squares, FLOAT32)
        + 2 * tf32**2 * squares
        + rounding(trace.expert_output, at_output)
    ) * weights**2 + rounding(weighted, at_weighted)
    times = _multiplicity(trace)[..., None]
    at_combine = format_of(numerics.combine, storage)
    independent = torch.where(present, times * own, 0).sum(dim=1) + accumulation(
        trace.local_ids.shape[1], trace.output, (weighted**2).sum(dim=1), at_combine
    )
    independent_floor = (weights.abs() * floor(trace.expert_output, at_output) + floor(weighted, at_weighted)).sum(
        dim=1
    ) + floor(trace.output, output)
    weight_error = (1 - on_input) * weight_error
    variance = (
        (times * weights**2 * shared).sum(dim=1) + independent + ((weight_error[..., None] * weighted) ** 2).sum(dim=1)
    )
    # Where no expert is present the answer is exactly zero, and so is the budget.
    any_present = present.any(dim=1)
    last = output.unit_roundoff * trace.output.abs() + output.half_smallest_subnormal
    return Budget(
        sigma=torch.where(any_present, variance, 0.0).sqrt(),
        last=torch.where(any_present, last, 0.0),
        hidden=hidden_variance,
        hidden_common=hidden_common,
        hidden_floor=hidden_floor,
        independent=torch.where(any_present, independent, 0.0),
        independent_floor=independent_floor,
        weight_error=weight_error,
    )


def projected_error(budget: Budget, trace: Trace, w2: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """What <error of a row, direction> may be, for several directions a row.

    The columns of a row share the roundings before the second GEMM, so their errors are not independent: those are
    carried through w2 exactly. The last rounding counts as independent.

    Args:
        budget: of the whole output.
        trace: the reference's.
        w2: `[E_local, H, I]`.
        directions: `[M, D, H]`.

    Returns:
        The variance, and the linear part of subnormal roundings, `[M, D]` each.
    """
    variance = torch.einsum("mdh,mh->md", directions**2, budget.independent + budget.last**2)
    linear = torch.einsum("mdh,mh->md", directions.abs(), budget.independent_floor)
    times = _multiplicity(trace)
    for expert, token, slot in _rows_of_each_expert(trace, w2.shape[0]):
        along = directions[token]
        through = along @ w2[expert].to(directions.dtype)  # [P, D, I]
        own = torch.einsum("pdh,ph->pd", along, trace.expert_output[token, slot])
        part = (
            torch.einsum("pdi,pi->pd", through**2, budget.hidden[token, slot])
            + torch.einsum("pdi,pi->pd", through, budget.hidden_common[token, slot]) ** 2
            + (budget.weight_error[token, slot, None] * own) ** 2
        )
        weights = trace.output_weights[token, slot, None]
        variance.index_add_(0, token, times[token, slot, None] * weights**2 * part)
        floors = torch.einsum("pdi,pi->pd", through.abs(), budget.hidden_floor[token, slot])
        linear.index_add_(0, token, weights.abs() * floors)
    return variance, linear
