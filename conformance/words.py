"""The parameters of a call in the reference's words: what an implementation's scales, activation and biases mean.

It knows no implementation: scales are any value with the fields `w13_scale`, `w2_scale`, `w13_zero_point`,
`w2_zero_point`, `block_shape`, `a13_scale`, `a2_scale` and `activation_scale` (none, static, tensor, token or group),
whose meaning is that of `reference.quantization`; an adapter is any value with the mappings `gate`, `up`, `gate_up` and
`down` from global experts to values with the fields `a [r, K]`, `b [N, r]` and `scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..reference.activations import SILU, Activation
from ..reference.lora import Adapter, LowRank, TokenAdapters
from ..reference.quantization import ActivationQuantization, QuantizedWeight


def reference_arguments(
    w13: Tensor,
    w2: Tensor,
    *,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    quant: Any = None,
    activation: str = "silu",
    swiglu_alpha: float = SILU.alpha,
    swiglu_limit: float = SILU.limit,
    interleaved: bool = False,
    adapters: Any = None,
    lora_ids: Tensor | None = None,
) -> dict[str, Any]:
    """The reference's arguments that say what the experts are; those that are as by default are left out.

    Args:
        w13: plain, or the stored numbers.
        w2: likewise.
        w13_bias: or None.
        w2_bias: or None.
        quant: how w13 and w2 are stored, in the fields above; None where they are plain.
        activation: by its name.
        swiglu_alpha: of swigluoai.
        swiglu_limit: of swigluoai.
        interleaved: gate and up rows alternate.
        adapters: a table of adapters: `experts`, the global ids of those that are held, by local id, and
            `adapter_of(slot)`; or None.
        lora_ids: `[M]`, the slot of each token's adapter, -1 for none; or None.
    """
    function = Activation(activation, swiglu_alpha, swiglu_limit, interleaved)
    words: dict[str, Any] = {"w13": w13, "w2": w2, "w13_bias": w13_bias, "w2_bias": w2_bias}
    words["activation"] = None if function == SILU else function
    if quant is not None:
        parts = 2 if function.is_gated and quant.block_shape is not None and quant.block_shape[0] else 1
        words["w13"] = QuantizedWeight(w13, quant.w13_scale, quant.w13_zero_point, quant.block_shape, parts)
        words["w2"] = QuantizedWeight(w2, quant.w2_scale, quant.w2_zero_point, quant.block_shape)
        dtype = torch.int8 if w2.dtype == torch.int8 else torch.float8_e4m3fn
        words["quantize_input"] = _activations(quant, dtype, quant.a13_scale)
        words["quantize_hidden"] = _activations(quant, dtype, quant.a2_scale)
    if adapters is not None and lora_ids is not None:
        local = {expert: index for index, expert in enumerate(adapters.experts)}
        held = {slot: adapters.adapter_of(slot) for slot in lora_ids.unique().tolist() if slot >= 0}
        exact = {slot: reference_adapter(each, local, function) for slot, each in held.items() if each is not None}
        words["adapters"] = TokenAdapters(exact, lora_ids.long())
    return {name: value for name, value in words.items() if value is not None}


def _activations(quant: Any, dtype: torch.dtype, static: Tensor | None) -> ActivationQuantization | None:
    match quant.activation_scale:
        case "none":
            return None
        case "static":
            return ActivationQuantization(dtype, static_scale=None if static is None else float(static))
        case "group":
            return ActivationQuantization(dtype, "group", quant.block_shape[1] if quant.block_shape else 0)
        case "token":
            return ActivationQuantization(dtype, "token")
        case "tensor":
            return ActivationQuantization(dtype, "tensor")
    raise ValueError(f"activation_scale: expected none, static, tensor, token or group, got {quant.activation_scale!r}")


def reference_adapter(adapter: Any, local: Mapping[int, int], activation: Activation = SILU) -> Adapter:
    """An adapter by local expert, over all of w13's rows, in float64.

    Args:
        adapter: in the fields above.
        local: the index among the weights of each global expert that is held; the others are left out.
        activation: says how w13's rows lie.
    """

    def exact(low_rank: Any, place: int | None = None) -> LowRank:
        b = low_rank.b.double()
        if place is not None and activation.is_gated:
            halves = [torch.zeros_like(b.T), torch.zeros_like(b.T)]
            halves[place] = b.T
            b = activation.joined(*halves).T
        return LowRank(low_rank.a.double(), b, low_rank.scale)

    gate_up: dict[int, tuple[LowRank, ...]] = {}
    for expert, index in local.items():
        found = [exact(part[expert], place) for place, part in enumerate((adapter.gate, adapter.up)) if expert in part]
        found += [exact(adapter.gate_up[expert])] if expert in adapter.gate_up else []
        gate_up[index] = tuple(found)
    down = {index: (exact(adapter.down[expert]),) for expert, index in local.items() if expert in adapter.down}
    return Adapter(gate_up, down)
