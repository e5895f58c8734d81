"""The CPU backend: plain torch, expert by expert over the experts that have tokens."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import ClassVar

import torch

from ..config import Activation, ActivationFormat, ActivationFunction, MoEConfig, QuantScheme
from ..lora.eager import expand_with_torch, shrink_with_torch
from ..platform import Platform, Vendor
from ..quantization import ExpertsQuantization, WeightScale
from ..quantize import quantize_with_torch
from .base import ExpertsCall, StandardExperts


class CpuExperts(StandardExperts):
    """Matrix products in float32; rounds to the storage dtype exactly where the Triton backend does.

    The products of int8 weights with int8 activations are exact integers. No weight is rounded once it is scaled:
    scales are multiplied in float32.
    """

    backend: ClassVar[str] = "cpu"

    @classmethod
    def refusal(cls, config: MoEConfig, platform: Platform) -> str | None:
        """Why plain torch cannot run `config` on `platform`; None where it can."""
        if platform.vendor is not Vendor.CPU:
            return f"the CPU backend does not run on {platform}"
        if config.activation_format is not ActivationFormat.STANDARD:
            return f"takes the standard activation format, got {config.activation_format}"
        return None

    @torch.no_grad()
    def apply(self, out: torch.Tensor, call: ExpertsCall) -> None:
        """Write the layer into `out`; see `StandardExperts.apply`."""
        weights, quant, lora = call.weights, call.weights.quant, call.lora
        num_tokens, top_k = call.topk_ids.shape
        dtype = out.dtype
        expert = _local_experts(call)
        by_expert = torch.argsort(expert, stable=True)
        counts = torch.bincount(expert + 1, minlength=weights.num_local_experts + 1).tolist()
        held = by_expert[counts[0] :]
        # An expert's pairs stand together among those held.
        ends = accumulate(counts[1:])
        runs = [
            (e, slice(end - count, end)) for e, (count, end) in enumerate(zip(counts[1:], ends, strict=True)) if count
        ]
        routing_weights = call.topk_weights.reshape(-1, 1)
        slots = None if lora is None else lora.lora_ids[held // top_k]

        w13 = _Weight(weights.w13, quant, is_first=True, parts=call.activation.rows_a_column)
        x = _Rows(call.hidden_states, quant, is_first=True, scales=call.input_scale)
        shrunk = None
        if lora is not None and slots is not None:
            shrunk = shrink_with_torch(call.adapted_states(dtype)[held // top_k], slots, runs, lora.table.w13)
        hidden = torch.empty((len(held), weights.intermediate_size), dtype=dtype)
        for e, run in runs:
            pairs = held[run]
            gate_up = w13.times(x, pairs // top_k, e)
            if lora is not None and slots is not None and shrunk is not None:
                expand_with_torch(gate_up, shrunk[run], slots[run], lora.table.w13, e)
            if call.apply_router_weight_on_input:
                gate_up *= routing_weights[pairs]
            if weights.w13_bias is not None:
                gate_up += weights.w13_bias[e].float()
            hidden[run] = _activated(gate_up.to(dtype).float(), call.activation)

        w2 = _Weight(weights.w2, quant, is_first=False, parts=1)
        rows = _Rows(hidden, quant, is_first=False)
        if lora is not None and slots is not None:
            shrunk = shrink_with_torch(hidden, slots, runs, lora.table.w2)
        y = torch.zeros((num_tokens * top_k, weights.hidden_size), dtype=dtype)
        for e, run in runs:
            pairs = held[run]
            expert_out = w2.times(rows, torch.arange(run.start, run.stop), e)
            if lora is not None and slots is not None and shrunk is not None:
                expand_with_torch(expert_out, shrunk[run], slots[run], lora.table.w2, e)
            if weights.w2_bias is not None:
                expert_out += weights.w2_bias[e].float()
            if not call.apply_router_weight_on_input:
                expert_out *= routing_weights[pairs]
            y[pairs] = expert_out.to(dtype)

        total = torch.zeros((num_tokens, weights.hidden_size), dtype=torch.float32)
        for choice in y.view(num_tokens, top_k, -1).unbind(1):
            total += choice
        out.copy_(total)


def _local_experts(call: ExpertsCall) -> torch.Tensor:
    """`[M * top_k]`: the local expert of each pair, -1 where it has none; a stray id is no expert."""
    expert = call.topk_ids.reshape(-1).long()
    expert = torch.where((expert >= 0) & (expert < call.global_num_experts), expert, -1)
    if call.expert_map is not None:
        expert = torch.where(expert >= 0, call.expert_map.long()[expert], -1)
        expert = torch.where((expert >= 0) & (expert < call.weights.num_local_experts), expert, -1)
    return expert


def _activated(gate_up: torch.Tensor, activation: ActivationFunction) -> torch.Tensor:
    """`[rows, 2I]` (or `[rows, I]`) float32 to `[rows, I]` float32.

    The error function's complement and the sigmoid keep their relative accuracy where 1 + erf and 1 + tanh cancel.
    """
    kind = activation.kind
    if not kind.is_gated:
        gate, up = gate_up, None
    elif activation.interleaved:
        gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=1)
    match kind:
        case Activation.SILU | Activation.SILU_NO_MUL:
            value = torch.nn.functional.silu(gate)
        case Activation.GELU | Activation.GELU_NO_MUL:
            value = gate * (torch.erfc(gate * -math.sqrt(0.5)) * 0.5)
        case Activation.GELU_TANH:
            value = gate * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate))
        case Activation.RELU2_NO_MUL:
            value = gate.relu().square()
        case Activation.SWIGLUOAI:
            gate = gate.clamp(max=activation.limit)
            value = gate * torch.sigmoid(activation.alpha * gate)
    if up is None:
        return value
    return value * (up.clamp(-activation.limit, activation.limit) + 1 if kind is Activation.SWIGLUOAI else up)


class _Rows:
    """The rows that enter a GEMM, as it reads them.

    Attributes:
        values: `[rows, K]`, quantised where the scheme quantises activations.
        scales: `[rows, 1]` or `[rows, ceil(K / bk)]` float32; None where there are none.
    """

    def __init__(
        self,
        x: torch.Tensor,
        quant: ExpertsQuantization | None,
        *,
        is_first: bool,
        scales: torch.Tensor | None = None,
    ) -> None:
        self.values, self.scales = x, None
        if scales is not None:  # x is quantised already
            self.scales = scales.expand(len(x), 1) if scales.ndim == 1 else scales
            return
        dtype = None if quant is None else quant.activation_dtype
        if quant is None or dtype is None:
            return
        static_scale = quant.a13_scale if is_first else quant.a2_scale
        self.values, scales = quantize_with_torch(x, dtype, quant.activation_scale, quant.group, static_scale)
        self.scales = scales.expand(len(x), 1) if scales.ndim == 1 else scales


class _Weight:
    """One of the layer's two weights."""

    def __init__(self, values: torch.Tensor, quant: ExpertsQuantization | None, *, is_first: bool, parts: int) -> None:
        self.values, self.quant, self.parts = values, quant, parts
        if quant is not None:
            self.scale = quant.w13_scale if is_first else quant.w2_scale
            self.zero_point = quant.w13_zero_point if is_first else quant.w2_zero_point

    def times(self, x: _Rows, rows: torch.Tensor, e: int) -> torch.Tensor:
        """`[len(rows), N]` float32: those rows of x times the weight of expert `e`."""
        values, weight = x.values[rows], self.values[e]
        if x.scales is None or self.quant is None:
            return values.float() @ self._dequantized(e).T
        scales = x.scales[rows]
        if self.quant.weight_scale is WeightScale.BLOCK:
            return _scaled_columns(values.float(), scales, self._columns) @ self._dequantized(e).T
        # One scale a row and one a channel stand outside of the sum. Integers below 2^53 are exact in float64.
        exact = torch.float64 if values.dtype == torch.int8 else torch.float32
        product = (values.to(exact) @ weight.to(exact).T).float()
        return product * scales * self.scale[e].float()

    @property
    def _columns(self) -> int:
        """Columns that share a scale."""
        return self.quant.block_shape[1] if self.quant is not None and self.quant.block_shape is not None else 0

    def _dequantized(self, e: int) -> torch.Tensor:
        """The weight of expert `e` in float32, `[N, K]`."""
        weight, quant = self.values[e], self.quant
        if quant is None:
            return weight.float()
        scale = self.scale[e].float()
        if quant.scheme is QuantScheme.INT4_W4A16:
            weight = _nibbles(weight, dim=1).float()
            if self.zero_point is None:
                weight -= 8
            else:
                weight -= _nibbles(self.zero_point[e], dim=0).float().repeat_interleave(self._columns, dim=1)
        weight = weight.float()
        match quant.weight_scale:
            case WeightScale.TENSOR:
                return weight * scale
            case WeightScale.CHANNEL:
                return weight * scale[:, None]
            case WeightScale.GROUP:
                return _scaled_columns(weight, scale, self._columns)
            case WeightScale.BLOCK:
                bn = quant.block_shape[0] if quant.block_shape is not None else 1
                # The grid of blocks starts anew at the first up row.
                part = weight.shape[0] // self.parts
                of_rows = torch.cat([s.repeat_interleave(bn, dim=0)[:part] for s in scale.chunk(self.parts)])
                return _scaled_columns(weight, of_rows, self._columns)


def _scaled_columns(values: torch.Tensor, scales: torch.Tensor, columns: int) -> torch.Tensor:
    """`values [rows, K]` float32 times `scales [rows, ceil(K / columns)]`."""
    return values * scales.repeat_interleave(columns, dim=1)[:, : values.shape[1]]


def _nibbles(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """The two numbers of each byte, the low nibble first, along `dim`."""
    return torch.stack((packed & 15, packed >> 4), dim=dim + 1).flatten(dim, dim + 1)
