"""The derived error budget: how far an honest implementation may be from the float64 reference, element by element.

First-order rounding propagation through the layer. Every rounding contributes its largest error (unit roundoff times
magnitude, plus half the smallest subnormal); contributions are independent, so they add in quadrature; the last
rounding to the output's dtype is one known step and adds by itself:

    |out - reference| <= lambda * sigma + last,     sigma from these functions, lambda from `calibration.json`.

Pure functions of the reference's trace and the declared numerics; `rounding.py`, `activation_budget.py` and
`quantization_budget.py` hold the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..reference.experts import Trace
from ..reference.quantization import QuantizedWeight, expert_weight
from .activation_budget import activation_floor, activation_variance, saturated, slopes
from .lora_budget import first_product_variance, second_product_variance
from .numerics import FLOAT32, TF32_UNIT_ROUNDOFF, Format, Numerics, format_of
from .operands import ExpertsOperands
from .quantization_budget import RARE_INPUT, columns_of_a_scale, is_shared_by_rows, leaning, leant, quantized
from .rounding import Accumulator, accumulation, beside_bias, floor, rounding

# As how many causes one counts where every error is a sum's. How far partial sums wander before they end where they end
# is chance too: their mean square is the integral of a squared Brownian bridge, of a mean of 1/6 and a variance of 1/45
# (Anderson and Darling, Annals of Mathematical Statistics 23(2), 1952). So a sum's error has a kurtosis of
# 3 (1 + 36 / 45) = 5.4 where a normal one has 3, and its square a relative variance of 4.4 for 2.
WANDERING = 2 / 4.4
# What a normal number exceeds once in a million cases, which is what the limits are fitted for (`calibrate.PER_CASE`).
NORMAL_QUANTILE = 4.753


@dataclass(frozen=True)
class Budget:
    """What the declared numerics allow around one reference output.

    Attributes:
        sigma: `[M, H]`, quadrature sum of all roundings but the last.
        last: `[M, H]`, the last rounding's largest error.
        hidden: `[M, top_k, I]`, squared, the part that all columns of a row share, as it stands at the second GEMM.
        hidden_typical: `[M, top_k, I]`, the same with each flip at its chance, for sums over many rows.
        hidden_single: `[M, top_k, I]`, the largest that one flip costs.
        hidden_common: `[M, top_k, I]`, the part of it that one rounding (of the weight on the input) causes everywhere.
        hidden_floor: `[M, top_k, I]`, the subnormal part of it.
        common_of_runs: `[M, top_k, C, I]`, errors of C causes that each run of `columns_of_a_scale` elements of a row
            shares (its scale, the values that a clamp makes one), signed.
        common: `[M, top_k, C, I]`, the same of causes that all rows share.
        independent: `[M, H]`, squared, the part that each column has for itself.
        independent_floor: `[M, H]`, the part of it that adds up along a row.
        of_causes: `[M]`, the sum of squares of the eigenvalues of a row's covariance by the causes that columns share.
        one_way: `[M]`, squared, what `hidden_floor` makes of a row where all of it goes up, or all of it down.
        weight_error: `[M, top_k]`, relative error of the routing weights where they are rounded on the output, else 0.
        columns_of_a_scale: how many columns of `hidden` share one scale.
        is_quantized: activations are, so that errors come in whole steps.
        is_summed: what sums round is no less than what storage does, as in float32.
    """

    sigma: Tensor
    last: Tensor
    hidden: Tensor
    hidden_typical: Tensor
    hidden_single: Tensor
    hidden_common: Tensor
    hidden_floor: Tensor
    common_of_runs: Tensor
    common: Tensor
    independent: Tensor
    independent_floor: Tensor
    of_causes: Tensor
    one_way: Tensor
    weight_error: Tensor
    columns_of_a_scale: int
    is_quantized: bool
    is_summed: bool

    def of_row(self) -> Tensor:
        """`[M]`, what the root of a row's squared errors' sum may be, in the units of the others: see `chance_of_row`.

        A row's variance V is a sum over independent causes; the columns that read one cause share its error. With
        Satterthwaite's degrees of freedom (Biometrics Bulletin 2(6), 1946), n = V^2 / sum_k of_k^2 for the
        eigenvalues of_k of the row's covariance: of what columns share (`of_causes`), and of what each has for itself.
        """
        columns = self.sigma**2 + self.last**2
        variance = columns.sum(dim=1)
        squares = self.of_causes + (columns**2).sum(dim=1)
        freedom = torch.where(squares == 0, 1.0, variance**2 / squares)
        if self.is_summed:
            freedom = freedom * WANDERING
        return (variance + self.one_way).sqrt() * chance_of_row(freedom)

    def first_rows(self, rows: int) -> Budget:
        """The budget of the first tokens."""
        return replace(self, **{name: t[:rows] for name, t in vars(self).items() if isinstance(t, Tensor)})


def chance_of_row(freedom: Tensor) -> Tensor:
    """How far the root of a row's squared errors' sum may be from that of its variance, by its degrees of freedom.

    At least 1: all errors at their largest at once, as where roundings of all columns go the same way. Else chance: a
    rounding is uniform within its largest error, of a standard deviation of 1 / sqrt(3) of it, and the mean of n
    squares of independent normal errors exceeds 1 - 2 / (9n) + z sqrt(2 / (9n)), cubed, where a normal number exceeds
    z (Wilson and Hilferty, PNAS 17(12), 1931). A row of one cause is one number, which may be as far off as an
    element; one of many averages them.

    Args:
        freedom: n; under 1 where errors have heavier tails than normal ones.
    """
    ninth = 2 / (9 * freedom)
    return ((1 - ninth + NORMAL_QUANTILE * ninth.sqrt()) ** 1.5 / 3**0.5).clamp(min=1)


# Hidden values of an expert whose every pair is looked at; of more, evenly as many.
PAIRED = 512


def _pairs_of_causes(variance: Tensor, exact: Tensor) -> Tensor:
    """sum_ij v_i v_j (w_i . w_j)^2: the sum of squares of the eigenvalues of sum_i v_i w_i w_i^T, `[P]`.

    Weights that share an offset (zero points) make one direction of all causes; the diagonal alone would not know.

    Args:
        variance: `[P, I]`, of each hidden value.
        exact: `[I, H]`, what each does to the columns.
    """
    every = -(-exact.shape[0] // PAIRED)
    some, chosen = exact[::every], variance[:, ::every]
    products = (some @ some.T) ** 2
    diagonal = products.diagonal()
    own = ((variance * (exact**2).sum(dim=1)) ** 2).sum(dim=1)
    others = ((chosen @ products) * chosen).sum(dim=1) - (chosen**2 * diagonal).sum(dim=1)
    return own + (exact.shape[0] / some.shape[0]) ** 2 * others.clamp(min=0)


def _multiplicity(trace: Trace) -> Tensor:
    """How often a token lists the expert of each slot, `[M, top_k]`.

    The n shares of a repeated expert have the same error: its variance is n times that of n independent ones.
    """
    return (trace.local_ids[:, :, None] == trace.local_ids[:, None, :]).sum(dim=2).to(trace.output.dtype)


def rows_of_each_expert(trace: Trace, num_local: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The expert's number, and its pairs' tokens and slots, in their order, for each expert that has any."""
    ids = trace.local_ids.flatten()
    # One question to the device, and not one for each expert.
    counts = torch.bincount(ids.clamp(min=-1) + 1, minlength=num_local + 1).tolist()
    order = ids.argsort(stable=True)[counts[0] :]
    top_k = max(1, trace.local_ids.shape[1])
    tokens, slots = ((order // top_k).split(counts[1:]), (order % top_k).split(counts[1:]))
    for expert, (token, slot) in enumerate(zip(tokens, slots, strict=True)):
        if counts[expert + 1]:
            yield expert, token, slot


def _bias_of_rows(bias: Tensor | None, trace: Trace, like: Tensor) -> Tensor:
    """The bias `[E_local, N]` of each routed pair, `[M, top_k, N]`, zero where no expert is."""
    if bias is None:
        return torch.zeros_like(like)
    here = (trace.local_ids >= 0)[..., None]
    return torch.where(here, bias[trace.local_ids.clamp(min=0)].to(like.dtype), 0.0)


def _weight_rounding(weight: Tensor | QuantizedWeight, numerics: Numerics, is_quantized: bool, to: Format) -> float:
    """Unit roundoff of a weight that is scaled back to the activations' dtype before it is used; 0 where it is not."""
    scaled_back = isinstance(weight, QuantizedWeight) and not is_quantized
    if not scaled_back:
        return 0.0
    return to.unit_roundoff if numerics.dequantized_weight == "storage" else FLOAT32.unit_roundoff


def experts_budget(trace: Trace, call: ExpertsOperands, numerics: Numerics) -> Budget:
    """The budget of a call whose activations are of one storage dtype, and whose trace is the reference's."""
    activation, on_input = call.activation, float(call.apply_router_weight_on_input)
    storage = call.hidden_states.dtype
    output = Format.of(storage)
    num_local, hidden_size, intermediate_size = call.w2.shape
    tf32 = TF32_UNIT_ROUNDOFF if numerics.input_precision == "tf32" and storage == torch.float32 else 0.0
    wide = trace.output.dtype
    here = trace.local_ids >= 0

    # The input as the first GEMM reads it: quantised from exact values, so that only a rare one flips.
    x_variance = torch.zeros_like(trace.x)
    input_dtype = None if call.quantize_input is None else call.quantize_input.dtype
    if call.quantize_input is not None:
        exact = call.hidden_states.to(wide)
        x_variance = quantized(exact, torch.zeros_like(exact), call.quantize_input, RARE_INPUT).flips.variance

    # First GEMM, where needed with the routing weight on its input (applied to the accumulator, one rounding).
    gate_up_squares = trace.gate.new_zeros(*trace.gate.shape[:2], call.w13.shape[1])
    from_input = torch.zeros_like(gate_up_squares)
    for expert, token, slot in rows_of_each_expert(trace, num_local):
        squared = (expert_weight(call.w13, expert, wide) ** 2).T
        factor = call.topk_weights[token, slot, None].to(wide) ** 2 if on_input else 1.0
        gate_up_squares[token, slot] = trace.x[token] ** 2 @ squared * factor
        if call.quantize_input is not None:
            from_input[token, slot] = x_variance[token] @ squared * factor
    in_order = activation.joined(trace.gate, trace.up)
    dot = in_order - _bias_of_rows(call.w13_bias, trace, in_order)
    at_gate_up = format_of(numerics.gate_up, storage)
    is_scaled = isinstance(call.w13, QuantizedWeight)
    weight_rounding = _weight_rounding(call.w13, numerics, input_dtype is not None, output)
    first = Accumulator.of(numerics, input_dtype, hidden_size, is_scaled=is_scaled)
    gate_up_variance = (
        first.variance(hidden_size, dot, gate_up_squares)
        + (2 * tf32**2 + weight_rounding**2) * gate_up_squares
        + from_input
        + (FLOAT32.unit_roundoff * in_order) ** 2 * float(call.w13_bias is not None)
        + rounding(in_order, at_gate_up)
    )
    # What all values of a hidden row share: flips of the input, and the few numbers that an adapter's A makes of it.
    shared_before = from_input
    if call.adapters is not None:
        of_adapters = first_product_variance(trace, call, numerics, x_variance)
        gate_up_variance, shared_before = gate_up_variance + of_adapters, shared_before + of_adapters
    gate_variance, up_variance = activation.split(gate_up_variance)
    one_way = floor(in_order, at_gate_up) + beside_bias(in_order, dot, at_gate_up)
    drift = first.drift(dot)
    gate_floor, up_floor = activation.split(one_way + drift)
    gate_dot, up_dot = activation.split(dot)
    # What rounds a routing weight: its own conversion where declared, and the float32 product with it.
    weight_error = torch.full_like(trace.output_weights, FLOAT32.unit_roundoff)
    if numerics.routing_weight == "storage":
        absolute = call.topk_weights.to(wide).abs().clamp(min=output.half_smallest_subnormal)
        weight_error = weight_error + output.unit_roundoff + output.half_smallest_subnormal / absolute

    # Activation.
    at_gate, at_hidden = format_of(numerics.gate, storage), format_of(numerics.hidden, storage)
    slope = slopes(activation, trace.gate, trace.up, gate_variance, up_variance)
    hidden_variance = activation_variance(activation, trace.gate, gate_variance, up_variance, slope, at_gate, at_hidden)
    hidden_floor = activation_floor(activation, trace.gate, slope, gate_floor, up_floor, at_gate_up, at_gate, at_hidden)
    gate_before, up_before = activation.split(shared_before)
    hidden_before = slope.of_gate**2 * gate_before + slope.of_up**2 * up_before
    hidden_common = on_input * weight_error[..., None] * (slope.of_gate * gate_dot + slope.of_up * up_dot)

    activated_variance = hidden_variance + hidden_common**2
    # The hidden rows as the second GEMM reads them: once quantised, an error is a flip or a scale's.
    scale_error = torch.zeros_like(trace.hidden)
    hidden_typical, hidden_single = hidden_variance, torch.zeros_like(hidden_variance)
    hidden_dtype = None if call.quantize_hidden is None else call.quantize_hidden.dtype
    if call.quantize_hidden is not None:
        gate_drift, up_drift = activation.split(drift)
        drifted = (slope.of_gate * gate_drift).abs() + (slope.of_up * up_drift).abs()
        known_to = hidden_variance + hidden_common**2 + hidden_floor**2
        added = quantized(trace.activated[here], known_to[here], call.quantize_hidden)
        hidden_variance, hidden_typical = torch.zeros_like(known_to), torch.zeros_like(known_to)
        # What drifts one way flips one way, as much of it as it drifts.
        hidden_floor = torch.where(here[..., None], drifted, 0.0)
        hidden_variance[here], hidden_typical[here] = added.flips.variance, added.flips.typical
        hidden_single[here], scale_error[here] = added.flips.single, added.scale_error
    columns = columns_of_a_scale(call.quantize_hidden, intermediate_size)
    # What elements have in common: a scale, and the few values that a clamp leaves. Where a scale is one row's own,
    # equal values need not flip in all rows, but in a row they do.
    of_scales = trace.hidden * scale_error
    how = call.quantize_hidden
    is_one_scale = how is not None and (is_shared_by_rows(how) or how.static_scale is not None)
    causes = []
    if how is not None:
        causes = [of_scales, trace.hidden * leaning(how, at_hidden)]
        if numerics.hidden == "storage":
            causes.append(torch.zeros_like(trace.hidden))
            causes[-1][here] = leant(trace.activated[here], how, storage)
    common, common_of_runs = (causes, []) if is_one_scale else ([], causes)
    for mask in saturated(activation, trace.gate, trace.up):
        common.append(torch.where(mask, trace.hidden.sign() * hidden_variance.sqrt(), 0.0))
        hidden_variance, hidden_typical, hidden_single = (
            torch.where(mask, 0.0, part) for part in (hidden_variance, hidden_typical, hidden_single)
        )
    if how is not None and not is_one_scale:
        common_of_runs += common
    none = trace.hidden.new_zeros(*here.shape, 0, intermediate_size)
    common, common_of_runs = (torch.stack(each, dim=2) if each else none for each in (common, common_of_runs))

    # Second GEMM and the weighted sum.
    shared = torch.zeros_like(trace.expert_output)
    squares = torch.zeros_like(trace.expert_output)
    moved = trace.output.new_zeros(common.shape[2], *trace.output.shape)
    of_causes, one_way_rows = torch.zeros_like(trace.output_weights), torch.zeros_like(trace.output_weights)
    for expert, token, slot in rows_of_each_expert(trace, num_local):
        exact = expert_weight(call.w2, expert, wide).T
        squared, of_common = exact**2, (hidden_common[token, slot] @ exact) ** 2
        shared[token, slot] = hidden_variance[token, slot] @ squared + of_common
        together = hidden_before[token, slot].minimum(hidden_variance[token, slot]) @ squared.sum(dim=1)
        of_pairs = _pairs_of_causes(hidden_variance[token, slot], exact)
        of_causes[token, slot] = of_pairs + together**2 + of_common.sum(dim=1) ** 2
        one_way_rows[token, slot] = ((hidden_floor[token, slot] @ exact) ** 2).sum(dim=1)
        squares[token, slot] = trace.hidden[token, slot] ** 2 @ exact**2
        if common.shape[2]:
            together = (common[token, slot] @ exact) * trace.output_weights[token, slot, None, None]
            moved.index_add_(1, token, together.transpose(0, 1))
        for start in range(0, intermediate_size if common_of_runs.shape[2] else 0, columns):
            run = slice(start, start + columns)
            of_run = (common_of_runs[token, slot][..., run] @ exact[run]) ** 2
            shared[token, slot] += of_run.sum(dim=1)
            of_causes[token, slot] += (of_run.sum(dim=2) ** 2).sum(dim=1)
    if call.adapters is not None:
        of_adapters = second_product_variance(trace, call, numerics, activated_variance)
        shared = shared + of_adapters
        of_causes = of_causes + of_adapters.sum(dim=2) ** 2
    weights = trace.output_weights[..., None]
    weighted = weights * trace.expert_output
    present = here[..., None]
    at_output, at_weighted = format_of(numerics.expert_output, storage), format_of(numerics.weighted, storage)
    dot = trace.expert_output - _bias_of_rows(call.w2_bias, trace, trace.expert_output)
    summing = Accumulator.of(numerics, hidden_dtype, intermediate_size, is_scaled=isinstance(call.w2, QuantizedWeight))
    weight_rounding = _weight_rounding(call.w2, numerics, hidden_dtype is not None, output)
    own = (
        summing.variance(intermediate_size, dot, squares)
        + (2 * tf32**2 + weight_rounding**2) * squares
        + (FLOAT32.unit_roundoff * trace.expert_output) ** 2 * float(call.w2_bias is not None)
        + rounding(trace.expert_output, at_output)
    ) * weights**2 + rounding(weighted, at_weighted)
    times = _multiplicity(trace)[..., None]
    at_combine = format_of(numerics.combine, storage)
    independent = torch.where(present, times * own, 0).sum(dim=1) + accumulation(
        trace.local_ids.shape[1], trace.output, (weighted**2).sum(dim=1), at_combine.unit_roundoff
    )
    # Numbers of few bits times one weight round in one direction where that is next to a power of two: an expert's
    # output is of few bits where it is its bias alone.
    of_few_bits = torch.where(trace.expert_output.to(storage) == trace.expert_output, output.unit_roundoff, 0.0)
    if numerics.expert_output == "storage":  # then all of them are, and lose what the weight lacks or has too much
        beyond = (weights.abs() / torch.exp2(weights.abs().log2().round()) - 1).abs().nan_to_num(0.0)
        of_few_bits = of_few_bits.maximum(torch.where(beyond <= output.unit_roundoff, beyond, 0.0))
    independent_floor = (
        weights.abs() * (floor(trace.expert_output, at_output) + summing.drift(dot))
        + floor(weighted, at_weighted)
        + weights.abs() * beside_bias(trace.expert_output, dot, at_output)
        + beside_bias(weighted, weights * dot, at_weighted)
        + of_few_bits * weighted.abs()
    ).sum(dim=1)
    independent_floor = (
        independent_floor
        + floor(trace.output, output)
        + beside_bias(trace.output, torch.where(present, weights * dot, 0.0).sum(dim=1), output)
    )
    weight_error = (1 - on_input) * weight_error
    of_weights = (weight_error[..., None] * weighted) ** 2
    of_causes = (
        # Slots add up as where they share their directions, the most that there can be (Minkowski); the n shares of a
        # repeated expert do, and their cause is n^2 times as large.
        (times[..., 0] * trace.output_weights**2 * of_causes.sqrt()).sum(dim=1) ** 2
        + ((moved**2).sum(dim=2) ** 2).sum(dim=0)
        + (of_weights.sum(dim=2) ** 2).sum(dim=1)
    )
    variance = (times * weights**2 * shared).sum(dim=1) + (moved**2).sum(dim=0) + independent + of_weights.sum(dim=1)
    # Where no expert is present the answer is exactly zero, and so is the budget.
    any_present = present.any(dim=1)
    last = output.unit_roundoff * trace.output.abs() + output.half_smallest_subnormal
    return Budget(
        sigma=torch.where(any_present, variance, 0.0).sqrt(),
        last=torch.where(any_present, last, 0.0),
        hidden=hidden_variance,
        hidden_typical=hidden_typical,
        hidden_single=hidden_single,
        hidden_common=hidden_common,
        hidden_floor=hidden_floor,
        common_of_runs=common_of_runs,
        common=common,
        independent=torch.where(any_present, independent, 0.0),
        independent_floor=independent_floor,
        of_causes=of_causes,
        one_way=(times[..., 0] * trace.output_weights**2 * one_way_rows).sum(dim=1),
        weight_error=weight_error,
        columns_of_a_scale=columns,
        is_quantized=call.quantize_input is not None,
        is_summed=output.unit_roundoff <= FLOAT32.unit_roundoff,
    )


@dataclass(frozen=True)
class Projected:
    """What <error of a row, direction> may be.

    Attributes:
        typical: `[M, D]`, a variance, independent from row to row, with each flip at its chance.
        single: `[M, D]`, squared, the largest that one flip costs.
        linear: `[M, D]`, of roundings that all go one way.
        moved: `[C, M, D]`, what the causes that all rows share move it by, with its sign.
    """

    typical: Tensor
    single: Tensor
    linear: Tensor
    moved: Tensor


def projected_error(budget: Budget, trace: Trace, w2: Tensor | QuantizedWeight, directions: Tensor) -> Projected:
    """What <error of a row, direction> may be, for several directions a row.

    The columns of a row share the roundings before the second GEMM, so their errors are not independent: those are
    carried through w2 exactly. The last rounding counts as independent.

    Args:
        budget: of the whole output.
        trace: the reference's.
        w2: `[E_local, H, I]`.
        directions: `[M, D, H]`.
    """
    typical = torch.einsum("mdh,mh->md", directions**2, budget.independent + budget.last**2)
    linear = torch.einsum("mdh,mh->md", directions.abs(), budget.independent_floor)
    single = torch.zeros_like(typical)
    moved = typical.new_zeros(budget.common.shape[2], *typical.shape)
    times = _multiplicity(trace)
    for expert, token, slot in rows_of_each_expert(trace, w2.shape[0]):
        along = directions[token]
        through = along @ expert_weight(w2, expert, directions.dtype)  # [P, D, I]
        own = torch.einsum("pdh,ph->pd", along, trace.expert_output[token, slot])
        squared = through**2
        part = (
            torch.einsum("pdi,pi->pd", through, budget.hidden_common[token, slot]) ** 2
            + (budget.weight_error[token, slot, None] * own) ** 2
        )
        weights = trace.output_weights[token, slot, None]
        for run in range(0, through.shape[-1] if budget.common_of_runs.shape[2] else 0, budget.columns_of_a_scale):
            columns = slice(run, run + budget.columns_of_a_scale)
            of_run = budget.common_of_runs[token, slot][..., columns]
            part = part + (torch.einsum("pdi,pci->pdc", through[..., columns], of_run) ** 2).sum(dim=-1)
        together = torch.einsum("pdi,pci->cpd", through, budget.common[token, slot])
        moved.index_add_(1, token, weights * together)
        scaled = times[token, slot, None] * weights**2
        flipped = torch.einsum("pdi,pi->pd", squared, budget.hidden_typical[token, slot])
        typical.index_add_(0, token, scaled * (part + flipped))
        largest = scaled * (squared * budget.hidden_single[token, slot, None]).amax(dim=-1)
        single.scatter_reduce_(0, token[:, None].expand_as(largest), largest, "amax")
        floors = torch.einsum("pdi,pi->pd", through.abs(), budget.hidden_floor[token, slot])
        linear.index_add_(0, token, weights.abs() * floors)
    return Projected(typical, single, linear, moved)
