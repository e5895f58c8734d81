"""The parameters of a call in the reference's words: what an implementation's scales, activation and biases mean.

It knows no implementation: scales are any value with the fields `w13_scale`, `w2_scale`, `w13_zero_point`,
`w2_zero_point`, `block_shape`, `a13_scale`, `a2_scale` and `activation_scale` (none, static, tensor, token or group),
whose meaning is that of `reference.quantization`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.activations import SILU, Activation
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
