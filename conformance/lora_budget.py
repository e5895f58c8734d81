"""What LoRA adapters add to the error budget of a pair's two products.

The reference's delta is exact; an implementation sums A x in float32, rounds it as declared (`Numerics.shrunk`), sums
B over the rank, multiplies by the adapter's scale and adds the product to the base's accumulator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference.experts import Trace
from ..reference.lora import LowRank
from ..reference.quantization import expert_weight
from .numerics import FLOAT32, TF32_UNIT_ROUNDOFF, Format, Numerics, format_of
from .operands import ExpertsOperands
from .rounding import accumulation, rounding


def _pairs(trace: Trace, call: ExpertsOperands, projection: str) -> Iterator[tuple[Tensor, Tensor, int, LowRank]]:
    """Token, slot and expert of the pairs that each low-rank matrix is added to."""
    adapters = call.adapters
    for index, adapter in () if adapters is None else adapters.adapters.items():
        mine = (adapters.lora_ids == index)[:, None] if adapters is not None else None
        for expert, matrices in getattr(adapter, projection).items():
            token, slot = ((trace.local_ids == expert) & mine).nonzero(as_tuple=True)
            for low_rank in matrices if token.numel() else ():
                yield token, slot, expert, low_rank


def _delta_variance(rows: Tensor, low_rank: LowRank, numerics: Numerics, storage: torch.dtype) -> Tensor:
    """Squared error of `scale * B (A x)` for exact rows `[P, K]`, and of adding it, `[P, N]`."""
    u = FLOAT32.unit_roundoff
    tf32 = TF32_UNIT_ROUNDOFF if numerics.input_precision == "tf32" and storage == torch.float32 else 0.0
    a, b, k = low_rank.a.to(rows.dtype), low_rank.scale * low_rank.b.to(rows.dtype), rows.shape[1]
    shrunk, squares = rows @ a.T, rows**2 @ (a**2).T
    of_shrunk = accumulation(k, shrunk, squares, u) + 2 * tf32**2 * squares
    of_shrunk = of_shrunk + rounding(shrunk, format_of(numerics.shrunk, storage))
    delta, products = shrunk @ b.T, shrunk**2 @ (b**2).T
    own = accumulation(b.shape[1], delta, products, u) + 2 * tf32**2 * products + 2 * (u * delta) ** 2
    # The base's sum, whose budget knows the total alone, is farther from zero by what the delta takes away.
    return of_shrunk @ (b**2).T + own + accumulation(k, delta, torch.zeros_like(delta), u)


def first_product_variance(trace: Trace, call: ExpertsOperands, numerics: Numerics, x_variance: Tensor) -> Tensor:
    """`[M, top_k, 2I]`, squared, in the order of w13's rows.

    Args:
        trace: the reference's.
        call: with adapters.
        numerics: declared.
        x_variance: `[M, H]`, squared error of the rows that w13 reads; A reads them too where it sees them quantised,
            rounded to storage.
    """
    wide = trace.output.dtype
    total = trace.gate.new_zeros(*trace.gate.shape[:2], call.w13.shape[1])
    storage = call.hidden_states.dtype
    is_seen_quantized = call.adapters is not None and call.adapters.sees_quantized
    seen = trace.x if is_seen_quantized else call.hidden_states.to(wide)
    for token, slot, expert, low_rank in _pairs(trace, call, "gate_up"):
        own = _delta_variance(seen[token], low_rank, numerics, storage)
        if is_seen_quantized:
            base, added = expert_weight(call.w13, expert, wide).abs(), low_rank.weight(seen).abs()
            own = own + rounding(seen[token], Format.of(storage)) @ (added**2).T
            own = own + x_variance[token] @ ((base + added) ** 2 - base**2).T
        on_input = call.topk_weights[token, slot, None].to(wide) ** 2 if call.apply_router_weight_on_input else 1.0
        total[token, slot] += own * on_input
    return total


def second_product_variance(trace: Trace, call: ExpertsOperands, numerics: Numerics, activated: Tensor) -> Tensor:
    """`[M, top_k, H]`, squared.

    Args:
        trace: the reference's.
        call: with adapters.
        numerics: declared.
        activated: `[M, top_k, I]`, squared error of the rows that A reads. The same error passes through w2, so both
            paths' gains add up before they are squared.
    """
    total = torch.zeros_like(trace.expert_output)
    for token, slot, expert, low_rank in _pairs(trace, call, "down"):
        rows = trace.activated[token, slot]
        base, added = expert_weight(call.w2, expert, rows.dtype).abs(), low_rank.weight(rows).abs()
        passed = activated[token, slot] @ ((base + added) ** 2 - base**2).T
        total[token, slot] += _delta_variance(rows, low_rank, numerics, call.hidden_states.dtype) + passed
    return total
