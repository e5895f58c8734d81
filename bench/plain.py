"""A timed layer in plain torch, expert by expert in a higher precision: what all rows of all contenders are held to.

It is written apart from every backend, and knows nothing of where they round but for one thing: activations are
quantised as the format says, the second GEMM's after they were rounded to storage.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ..impl.config import QuantScheme
from ..impl.quantization import ActivationScale, ExpertsQuantization, WeightScale
from ..impl.quantize import quantize_activations
from .operands import Operands


def plain_experts(operands: Operands) -> torch.Tensor:
    """`[M, H]`: the layer, with its adapters, in float64 for float32 operands, else in float32."""
    x, quant = operands.hidden_states, operands.quant
    precise = torch.float64 if x.dtype == torch.float32 else torch.float32
    ids = operands.topk_ids.long()
    if operands.expert_map is not None:
        ids = torch.where(ids >= 0, operands.expert_map.long()[ids.clamp(min=0)], -1)
    pairs = [torch.where(ids == expert) for expert in range(operands.w2.shape[0])]
    seen = _as_seen(x, quant, "a13").to(precise)
    hidden = [seen.new_zeros(0, operands.intermediate_size)]
    for expert, (rows, _) in enumerate(pairs):
        if rows.numel():
            gate_up = seen[rows] @ plain_weight(operands, "w13", expert, precise).T
            if operands.lora_ids is not None:
                gate_up += _of_adapters(operands, "w13", expert, rows, x[rows].to(precise))
            if operands.w13_bias is not None:
                gate_up += operands.w13_bias[expert]
            hidden.append(_activated(gate_up, operands))
    every = torch.cat(hidden)
    if quant is not None and quant.activation_scale is not ActivationScale.NONE:
        every = _as_seen(every.to(x.dtype), quant, "a2").to(precise)
    out = torch.zeros(x.shape, dtype=precise, device=x.device)
    for expert, ((rows, slots), inner) in enumerate(zip(pairs, every.split([len(r) for r, _ in pairs]), strict=True)):
        if rows.numel():
            result = inner @ plain_weight(operands, "w2", expert, precise).T
            if operands.lora_ids is not None:
                result += _of_adapters(operands, "w2", expert, rows, inner)
            if operands.w2_bias is not None:
                result += operands.w2_bias[expert]
            out.index_add_(0, rows, result * operands.topk_weights[rows, slots, None].to(precise))
    return out


def plain_weight(operands: Operands, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """`[N, K]`: what the stored numbers of one expert's `w13` or `w2` mean."""
    weight = (operands.w13 if name == "w13" else operands.w2)[expert]
    quant = operands.quant
    if quant is None:
        return weight.to(dtype)
    scale = (quant.w13_scale if name == "w13" else quant.w2_scale)[expert].to(dtype)
    zero_point = quant.w13_zero_point if name == "w13" else quant.w2_zero_point
    bn, bk = quant.block_shape or (0, 0)
    if weight.dtype == torch.uint8:
        weight = torch.stack((weight % 16, weight // 16), dim=2).flatten(1).to(dtype)
        if zero_point is None:
            weight = weight - 8
        else:
            zeros = torch.stack((zero_point[expert] % 16, zero_point[expert] // 16), dim=1).flatten(0, 1)
            weight = weight - zeros.to(dtype).repeat_interleave(bk, dim=1)
    weight = weight.to(dtype)
    match quant.weight_scale:
        case WeightScale.TENSOR:
            return weight * scale
        case WeightScale.CHANNEL:
            return weight * scale[:, None]
        case WeightScale.GROUP:
            return weight * scale.repeat_interleave(bk, dim=1)
        case WeightScale.BLOCK:
            parts = 2 if name == "w13" and operands.is_gated else 1
            rows = weight.shape[0] // parts
            grids = [grid.repeat_interleave(bn, dim=0)[:rows] for grid in scale.chunk(parts)]
            return weight * torch.cat(grids).repeat_interleave(bk, dim=1)[:, : weight.shape[1]]


def _of_adapters(
    operands: Operands, name: str, expert: int, rows: torch.Tensor, inner: torch.Tensor
) -> torch.Tensor | float:
    """`[P, N]`: what adapters of tokens `rows [P]` add to an expert's product with `inner [P, K]`; 0 for nothing."""
    table, lora_ids = operands.adapters, operands.lora_ids
    if table is None or lora_ids is None:
        return 0.0
    stacked = table.w13 if name == "w13" else table.w2
    total = inner.new_zeros(len(rows), stacked.b.shape[2])
    for slot in lora_ids[rows].unique().tolist():
        if slot < 0:
            continue
        mine = lora_ids[rows] == slot
        for part, rank in enumerate(stacked.ranks[slot, expert].tolist()):
            start, place = part * stacked.width, stacked.rows_of(part)
            a = stacked.a[slot, expert, start : start + rank].to(inner.dtype)
            b = stacked.b[slot, expert, place, :rank].to(inner.dtype)
            delta = torch.zeros_like(total)
            delta[:, place] = stacked.scales[slot, expert, part] * (inner @ a.T @ b.T)
            total += torch.where(mine[:, None], delta, 0.0)
    return total


def _as_seen(x: torch.Tensor, quant: ExpertsQuantization | None, which: str) -> torch.Tensor:
    """The rows as a GEMM reads them: quantised and scaled back, in float32, where the format says so."""
    if quant is None or quant.activation_scale is ActivationScale.NONE or not len(x):
        return x
    dtype = torch.int8 if quant.scheme is QuantScheme.INT8_W8A8 else torch.float8_e4m3fn
    group = quant.block_shape[1] if quant.block_shape is not None else 0
    static = quant.a13_scale if which == "a13" else quant.a2_scale
    values, scales = quantize_activations(
        x, dtype, quant.activation_scale, group=group, static_scale=static, backend="torch"
    )
    return plain_rows(values, scales, group)


def plain_rows(values: torch.Tensor, scales: torch.Tensor | None, group: int = 0) -> torch.Tensor:
    """`[rows, K]`: what stored rows mean, in float32 where they have scales: one for each `group` of columns if any."""
    if scales is None:
        return values
    if group:
        scales = scales.repeat_interleave(group, dim=1)[:, : values.shape[1]]
    return values.float() * scales


def _activated(gate_up: torch.Tensor, operands: Operands) -> torch.Tensor:
    """`[rows, I]`, with the default parameters of swigluoai."""
    name = operands.activation
    if not operands.is_gated:
        inner = {"silu_no_mul": functional.silu, "gelu_no_mul": functional.gelu, "relu2_no_mul": _relu2}[name]
        return inner(gate_up)
    gate, up = (gate_up[:, 0::2], gate_up[:, 1::2]) if operands.interleaved else gate_up.chunk(2, dim=1)
    if name == "swigluoai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    if name == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none") * up


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return x.relu().square()
