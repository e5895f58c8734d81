"""Honest emulations: MoE layers that round exactly where a declaration says, and accumulate in an order of their own.

The limits of the budget are fitted on these, never on a subject under test. Each seed is another implementation:
another order of the terms, another chunk of the accumulator, another way to divide by a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.activations import Activation
from ..reference.experts import to_local_ids
from ..reference.quantization import ActivationQuantization, QuantizedWeight
from .cases import ExpertsCase
from .numerics import HOPPER_FP8_UNIT_ROUNDOFF, Numerics, Rounding

CHUNKS = (1, 4, 8, 16, 32)
# Products that a tensor core adds up at once in fp8.
FP8_CHUNK = 32


def _rounded(values: Tensor, rounding: Rounding, storage: torch.dtype) -> Tensor:
    """Round float32 values to storage where declared; they stay float32."""
    return values.to(storage).float() if rounding == "storage" else values


def _truncated(values: Tensor) -> Tensor:
    """float32 values cut to the bits of a short sum."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa / HOPPER_FP8_UNIT_ROUNDOFF).trunc() * HOPPER_FP8_UNIT_ROUNDOFF, exponent)


@dataclass(frozen=True)
class _Rows:
    """Rows `[R, K]` as a GEMM reads them: float32 numbers, and the scale of each where they are quantised."""

    numbers: Tensor
    scales: Tensor | None = None

    def at(self, rows: Tensor) -> _Rows:
        return _Rows(self.numbers[rows], None if self.scales is None else self.scales[rows])


@dataclass
class _Arithmetic:
    """One implementation's choices."""

    numerics: Numerics
    storage: torch.dtype
    generator: torch.Generator
    chunk: int
    divides: bool

    def dot(self, a: Tensor, b: Tensor, *, is_short: bool = False) -> Tensor:
        """a [P, K] @ b [N, K]^T with a float32 accumulator: terms in random order, added chunk by chunk."""
        order = torch.randperm(a.shape[1], generator=self.generator)
        total = torch.zeros(a.shape[0], b.shape[0])
        chunk = FP8_CHUNK if is_short else self.chunk
        window, inside = torch.zeros_like(total), 0
        for part in order.split(chunk):
            # The products and sums inside a chunk are rounded once, the running sum once per chunk.
            products = (a[:, part].double() @ b[:, part].double().T).float()
            if not is_short:
                total = total + products
                continue
            window, inside = _truncated(window + products), inside + chunk
            if self.numerics.promoted_every and inside >= self.numerics.promoted_every:
                total, window, inside = total + window, torch.zeros_like(window), 0
        return total + window

    def quantized(self, rows: Tensor, how: ActivationQuantization | None) -> _Rows:
        """float32 rows `[R, K]` in few bits, in float32 arithmetic."""
        if how is None:
            return _Rows(rows)
        if rows.numel() == 0:
            return _Rows(rows, torch.ones_like(rows))
        largest = 127.0 if how.dtype == torch.int8 else 448.0
        if how.static_scale is not None:
            scales = torch.full_like(rows, how.static_scale)
        else:
            width = {"tensor": rows.numel(), "token": rows.shape[1], "group": how.group}[how.granularity]
            whole = rows.reshape(1, -1) if how.granularity == "tensor" else rows
            amax = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in whole.split(max(1, width), dim=1)], 1)
            amax = amax.reshape(rows.shape)
            scales = torch.where(amax == 0, 1.0, amax / largest if self.divides else amax * (1 / largest))
        scaled = rows / scales if self.divides else rows * (1 / scales)
        scaled = scaled.clamp(-largest, largest)
        return _Rows(scaled.round() if how.dtype == torch.int8 else scaled.to(how.dtype).float(), scales)

    def product(self, rows: _Rows, weight: Tensor | QuantizedWeight, expert: int) -> Tensor:
        """What the GEMM of one expert leaves in its accumulator, `[R, N]` float32."""
        if not isinstance(weight, QuantizedWeight):
            return self.dot(rows.numbers, weight[expert].float())
        numbers, scales = _stored(weight, expert)
        if rows.scales is None:
            return self.dot(rows.numbers, _rounded(numbers * scales, self.numerics.dequantized_weight, self.storage))
        total = torch.zeros(rows.numbers.shape[0], numbers.shape[0])
        run = weight.block_shape[1] if weight.block_shape else max(1, numbers.shape[1])
        is_integer = weight.values.dtype == torch.int8
        for start in range(0, numbers.shape[1], run):
            part = slice(start, start + run)
            a, b = rows.numbers[:, part], numbers[:, part]
            if is_integer:
                summed = (a.double() @ b.double().T).float()
            else:
                summed = self.dot(a, b, is_short=self.numerics.accumulator == "hopper_fp8")
            of_rows, of_columns = rows.scales[:, start, None], scales[None, :, start]
            total += summed * (of_rows * of_columns) if self.divides else summed * of_rows * of_columns
        return total

    def activated(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        """The activation in float32, with the roundings that are declared."""
        name = activation.name.removesuffix("_no_mul")
        if name == "swigluoai":
            gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit) + 1
            a = gate / (1 + torch.exp(-activation.alpha * gate))
        elif name == "silu":
            a = gate / (1 + torch.exp(-gate))
        elif name == "relu2":
            a = gate.clamp(min=0) ** 2
        else:
            a = torch.nn.functional.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")
        a = _rounded(a, self.numerics.gate, self.storage)
        return _rounded(a * up if activation.is_gated else a, self.numerics.hidden, self.storage)


def _stored(weight: QuantizedWeight, expert: int) -> tuple[Tensor, Tensor]:
    """The stored numbers of one expert, less their zeros, and the scale of each: float32 `[N, K]` both."""
    _, n, k = weight.shape
    row, column = torch.arange(n)[:, None], torch.arange(k)[None, :]
    stored = weight.values[expert]
    numbers = stored.float()
    bn, bk = weight.block_shape or (0, 0)
    if stored.dtype == torch.uint8:
        numbers = ((stored[row, column // 2] >> (4 * (column % 2)).to(torch.uint8)) & 15).float()
        if weight.zero_point is None:
            numbers = numbers - 8
        else:
            zeros = weight.zero_point[expert][row // 2, column // bk]
            numbers = numbers - ((zeros >> (4 * (row % 2)).to(torch.uint8)) & 15).float()
    scale = weight.scale[expert].float()
    if scale.ndim == 0:
        return numbers, scale.expand(n, k)
    if scale.ndim == 1:
        return numbers, scale[:, None].expand(n, k)
    if bn:
        part = n // weight.parts
        row = row // part * -(-part // bn) + row % part // bn
    return numbers, scale[row, column // bk]


def emulate(case: ExpertsCase, numerics: Numerics, seed: int) -> Tensor:
    """One honest output `[M, H]` of a case on the CPU under declared numerics."""
    call = case.operands()
    storage = call.hidden_states.dtype
    how = _Arithmetic(
        numerics, storage, torch.Generator().manual_seed(seed), CHUNKS[seed % len(CHUNKS)], divides=seed // 7 % 2 == 0
    )
    local_ids = to_local_ids(call.topk_ids, call.expert_map)
    weights = _rounded(call.topk_weights, numerics.routing_weight, storage)
    x = how.quantized(call.hidden_states.float(), call.quantize_input)
    pairs = [(local_ids == expert).nonzero(as_tuple=True) for expert in range(case.num_local_experts)]
    activated = torch.zeros(*call.topk_ids.shape, call.w2.shape[2])
    for expert, (token, slot) in enumerate(pairs):
        if token.numel() == 0:
            continue
        rows = how.product(x.at(token), call.w13, expert)
        if call.apply_router_weight_on_input:
            rows = rows * weights[token, slot, None]
        if call.w13_bias is not None:
            rows = rows + call.w13_bias[expert].float()
        gate, up = call.activation.split(_rounded(rows, numerics.gate_up, storage))
        activated[token, slot] = how.activated(call.activation, gate, up)
    here = local_ids >= 0
    hidden = how.quantized(activated[here], call.quantize_hidden)
    place = torch.zeros(here.shape, dtype=torch.long)
    place[here] = torch.arange(int(here.sum()))
    contributions = torch.zeros(*call.topk_ids.shape, call.hidden_states.shape[1])
    for expert, (token, slot) in enumerate(pairs):
        if token.numel() == 0:
            continue
        y = how.product(hidden.at(place[token, slot]), call.w2, expert)
        if call.w2_bias is not None:
            y = y + call.w2_bias[expert].float()
        y = _rounded(y, numerics.expert_output, storage)
        if not call.apply_router_weight_on_input:
            y = y * weights[token, slot, None]
        contributions[token, slot] = _rounded(y, numerics.weighted, storage)
    total = torch.zeros(call.hidden_states.shape)
    for slot in torch.randperm(case.top_k, generator=how.generator).tolist():
        total = _rounded(total + contributions[:, slot], numerics.combine, storage)
    return total.to(storage)
