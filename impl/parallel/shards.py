"""One rank's part of a layer's weights: its experts, and of each of them its columns of I.

A shard is a layer of its own with a smaller I: gate and up rows of w13 are cut alike, and columns of w2. Partial sums
over the shards are the layer; the second GEMM's bias belongs to the sum, so one shard alone adds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..checks import expect_int
from ..lora.adapter import Adapter, LowRank
from ..quantization import ExpertsQuantization, WeightScale
from ..weights import ExpertsWeights
from .rows import take_rows

Cut = Callable[[torch.Tensor], torch.Tensor]


def _rows(tensor: torch.Tensor, dim: int, rank: int, size: int, *, parts: int = 1) -> torch.Tensor:
    """The rank-th of `size` equal parts along `dim`, of each of `parts` equal blocks there."""
    blocks = tensor.unflatten(dim, (parts, size, -1)).select(dim + 1, rank)
    return blocks.flatten(dim, dim + 1).contiguous()


def _expect_shards(weights: ExpertsWeights, tp_size: int) -> None:
    steps = weights.block_shape or (1,)
    size, cut = divmod(weights.intermediate_size, tp_size)
    if cut or any(step and size % step for step in steps):
        whole = "" if weights.block_shape is None else f" into whole blocks or groups of {weights.block_shape}"
        raise ValueError(f"tp_size: expected a divisor of I {weights.intermediate_size}{whole}, got {tp_size}")


def experts_of_rank(weights: ExpertsWeights, experts: Sequence[int]) -> ExpertsWeights:
    """The weights of some experts alone, in this order, as copies.

    Args:
        weights: of all experts.
        experts: their ids, as `ExpertPlacement.experts_of_rank` gives them.
    """
    which = torch.tensor(list(experts), dtype=torch.int64, device=weights.w2.device)

    def some(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else take_rows(tensor, which)

    quant = weights.quant
    if quant is not None:
        names = ("w13_scale", "w2_scale", "w13_zero_point", "w2_zero_point")
        quant = replace(quant, **{name: some(getattr(quant, name)) for name in names})
    w13, w2 = take_rows(weights.w13, which), take_rows(weights.w2, which)
    return ExpertsWeights(w13, w2, some(weights.w13_bias), some(weights.w2_bias), quant)


def shard_of_experts(
    weights: ExpertsWeights, tp_rank: int, tp_size: int, *, is_gated: bool = True, interleaved: bool = False
) -> ExpertsWeights:
    """One rank's columns of I of each expert, as copies.

    Args:
        weights: whole experts.
        tp_rank: which shard.
        tp_size: of how many.
        is_gated: w13 has gate and up rows.
        interleaved: they alternate.

    Raises:
        ValueError: shards that would cut a block, a group or a pair of packed numbers.
    """
    expect_int("tp_size", tp_size, low=1)
    expect_int("tp_rank", tp_rank, low=0, high=tp_size - 1)
    if tp_size == 1:
        return weights
    _expect_shards(weights, tp_size)
    parts = 2 if is_gated and not interleaved else 1

    def of_w13(tensor: torch.Tensor) -> torch.Tensor:
        return _rows(tensor, 1, tp_rank, tp_size, parts=parts)

    def of_w2(tensor: torch.Tensor) -> torch.Tensor:
        return _rows(tensor, 2, tp_rank, tp_size)

    bias = weights.w2_bias
    return ExpertsWeights(
        of_w13(weights.w13),
        of_w2(weights.w2),
        None if weights.w13_bias is None else of_w13(weights.w13_bias),
        # Every shard has a bias, so that all ranks run the same kernels; those of the others are zero.
        bias if bias is None or tp_rank == 0 else torch.zeros_like(bias),
        None if weights.quant is None else _shard_of_scales(weights.quant, of_w13, of_w2),
    )


def _shard_of_scales(quant: ExpertsQuantization, of_w13: Cut, of_w2: Cut) -> ExpertsQuantization:
    w13_zero, w2_zero = quant.w13_zero_point, quant.w2_zero_point
    w13_scale, w2_scale = quant.w13_scale, quant.w2_scale
    if quant.weight_scale is not WeightScale.TENSOR:
        w13_scale = of_w13(w13_scale)
    if quant.weight_scale in (WeightScale.BLOCK, WeightScale.GROUP):
        w2_scale = of_w2(w2_scale)
    return replace(
        quant,
        w13_scale=w13_scale,
        w2_scale=w2_scale,
        w13_zero_point=None if w13_zero is None else of_w13(w13_zero),
        w2_zero_point=None if w2_zero is None else of_w2(w2_zero),
    )


def shard_of_adapter(
    adapter: Adapter, tp_rank: int, tp_size: int, *, is_gated: bool = True, interleaved: bool = False
) -> Adapter:
    """One rank's part of an adapter, cut as `shard_of_experts` cuts the experts: rows of w13's B, columns of w2's A.

    w13's A and w2's B are whole on every rank: a sum over the shards' outputs has each adapter's addition once.

    Args:
        adapter: of whole experts.
        tp_rank: which shard.
        tp_size: of how many.
        is_gated: w13 has gate and up rows.
        interleaved: they alternate.

    Raises:
        TypeError, ValueError: no adapter, or shards that would cut a column of I.
    """
    expect_int("tp_size", tp_size, low=1)
    expect_int("tp_rank", tp_rank, low=0, high=tp_size - 1)
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter: expected an Adapter, got {type(adapter).__name__}")
    if tp_size == 1:
        return adapter
    joined = 2 if is_gated else 1

    def cut(name: str, expert: int, low_rank: LowRank) -> LowRank:
        size = low_rank.a.shape[1] if name == "down" else low_rank.b.shape[0] // (joined if name == "gate_up" else 1)
        if size % tp_size:
            raise ValueError(f"tp_size: expected a divisor of I {size} of adapter.{name}[{expert}], got {tp_size}")
        if name == "down":
            return replace(low_rank, a=_rows(low_rank.a, 1, tp_rank, tp_size))
        parts = joined if name == "gate_up" and not interleaved else 1
        return replace(low_rank, b=_rows(low_rank.b, 0, tp_rank, tp_size, parts=parts))

    parts: dict[str, dict[int, LowRank]] = {}
    for name, expert, low_rank in adapter.entries():
        parts.setdefault(name, {})[expert] = cut(name, expert, low_rank)
    return replace(adapter, **parts)
