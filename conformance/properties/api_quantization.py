"""Bad calls of the experts: scales, zero points, biases and activations that contradict the weights or each other.

The fields of `ExpertsQuantization` are passed as a mapping, since this room does not know the subject's class; the
judge hands them to it inside the call, so that a contradiction may be refused there as well as in the function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .bad_input import Change, mapped, on_meta, put

# function, argument, what, change, debug, base
Call = tuple[str, str, str, Change, bool, str]

H, I, E = 32, 16, 4
# H, I, and a block's rows and columns, or (with groups) a group's columns.
Sizes = tuple[int, int, int, int]
SMALL: Sizes = (H, I, 16, 16)
FP8 = torch.float8_e4m3fn


def quantized_arguments(base: str, device: str, sizes: Sizes = SMALL) -> dict[str, Any]:
    """The arguments of a good call that belong to its weights: w13 `[4, 2I, H]`, w2 `[4, H, I]`, scales, biases."""
    h, i, block_n, block_k = sizes

    def scale(*shape: int, value: float = 0.125, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    def weights(dtype: torch.dtype, packed: int = 1) -> dict[str, torch.Tensor]:
        return {
            "w13": torch.ones(E, 2 * i, h // packed, device=device).to(dtype),
            "w2": torch.ones(E, h, i // packed, device=device).to(dtype),
        }

    def stored(dtype: torch.dtype, scheme: str, w13: tuple[int, ...], w2: tuple[int, ...], **fields: Any) -> Any:
        quant = {"scheme": scheme, "w13_scale": scale(E, *w13), "w2_scale": scale(E, *w2)} | fields
        return weights(dtype, 2 if dtype == torch.uint8 else 1) | {"quant": quant}

    def runs(size: int, of: int) -> int:
        return -(-size // max(1, of))

    channel, group = ((2 * i,), (h,)), ((2 * i, runs(h, block_k)), (h, runs(i, block_k)))
    blocks = (2 * runs(i, block_n), runs(h, block_k)), (runs(h, block_n), runs(i, block_k))
    match base:
        case "fp8_tensor":
            return stored(FP8, "fp8_w8a8", (), ())
        case "fp8_static":
            return stored(FP8, "fp8_w8a8", (), (), a13_scale=scale(1), a2_scale=scale(1))
        case "fp8_channel":
            return stored(FP8, "fp8_w8a8", *channel, per_act_token_quant=True)
        case "fp8_block":
            return stored(FP8, "fp8_w8a8", *blocks, block_shape=(block_n, block_k))
        case "int8_w8a8":
            return stored(torch.int8, "int8_w8a8", *channel, per_act_token_quant=True)
        case "int8_channel":
            return stored(torch.int8, "int8_w8a16", *channel)
        case "int8_group":
            return stored(torch.int8, "int8_w8a16", *group, block_shape=(0, block_k))
        case "int4":
            return stored(torch.uint8, "int4_w4a16", *group, block_shape=(0, block_k))
        case "int4_zeros":
            zeros = {
                "w13_zero_point": torch.full((E, i, group[0][1]), 0x88, dtype=torch.uint8, device=device),
                "w2_zero_point": torch.full((E, h // 2, group[1][1]), 0x88, dtype=torch.uint8, device=device),
            }
            return stored(torch.uint8, "int4_w4a16", *group, block_shape=(0, block_k), **zeros)
        case "bias":
            return {"w13_bias": scale(E, 2 * i, dtype=torch.bfloat16), "w2_bias": scale(E, h)}
        case "optional":
            expert_map = torch.arange(E, dtype=torch.int32, device=device)
            out = torch.zeros(4, h, dtype=torch.bfloat16, device=device)
            return {"expert_map": expert_map, "out": out} | quantized_arguments("bias", device, sizes)
        case "swigluoai":
            return {"activation": "swigluoai", "swiglu_alpha": 1.5, "swiglu_limit": 6.0, "interleaved": True}
        case "relu2":
            return {"activation": "relu2_no_mul", "w13": scale(E, i, h, dtype=torch.bfloat16)}
    raise ValueError(f"base: expected one of {BASES}, got {base!r}")


BASES = (
    *("fp8_tensor", "fp8_static", "fp8_channel", "fp8_block", "int8_w8a8", "int8_channel", "int8_group", "int4"),
    *("int4_zeros", "bias", "optional", "swigluoai", "relu2"),
)
QUANTIZED = BASES[:9]


def _field(**values: Any) -> Change:
    return lambda good: good | {"quant": good["quant"] | values}


def _of_field(name: str, function: Callable[[torch.Tensor], Any]) -> Change:
    return lambda good: good | {"quant": good["quant"] | {name: function(good["quant"][name])}}


def _quant_from(base: str) -> Change:
    return lambda good: good | {"quant": quantized_arguments(base, str(good["w2"].device))["quant"]}


def _weights_as(dtype: torch.dtype) -> Change:
    return lambda good: good | {name: good[name].to(torch.float32).to(dtype) for name in ("w13", "w2")}


def _not_contiguous(t: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(2, dim=0)[::2] if t.ndim > 1 else t.repeat_interleave(2)[::2]


def _calls() -> list[Call]:
    calls: list[Call] = []

    def bad(
        base: str, argument: str, what: str, change: Change, *, debug: bool = False, function: str = "fused_experts"
    ) -> None:
        calls.append((function, argument, what, change, debug, base))

    # Weights and the scheme that reads them.
    for name in ("w13", "w2"):
        for dtype in (FP8, torch.int8, torch.uint8):
            bad("", name, f"is {str(dtype)[6:]} without scales", mapped(name, lambda t, d=dtype: t.float().to(d)))
    for base, dtype in (
        ("fp8_tensor", torch.bfloat16),
        ("fp8_channel", torch.int8),
        ("fp8_block", torch.float8_e5m2),
        ("int8_w8a8", FP8),
        ("int8_w8a8", torch.bfloat16),
        ("int8_group", torch.uint8),
        ("int4", torch.int8),
    ):
        bad(base, "w2", f"is {str(dtype)[6:]}", _weights_as(dtype))
        bad(base, "w13", f"alone is {str(dtype)[6:]}", mapped("w13", lambda t, d=dtype: t.float().to(d)))
    for base in ("fp8_tensor", "int8_channel", "int4"):
        bad(base, "hidden_states", "is float32", mapped("hidden_states", lambda t: t.float()))
        bad(base, "w13", "has another H", mapped("w13", lambda t: t[..., :-8].contiguous()))
        bad(base, "w13", "has half the rows of a gated activation", mapped("w13", lambda t: t[:, :I].contiguous()))
        bad(base, "w2", "has another H", mapped("w2", lambda t: t[:, :-8].contiguous()))
        bad(base, "quant", "is a name", put(quant="fp8_w8a8"))
        bad(base, "quant", "is a list", put(quant=[]))
    bad("int4", "hidden_states", "has an odd H", mapped("hidden_states", lambda t: t[:, :-1].contiguous()))
    for scheme in ("none", "fp4", None):
        bad("fp8_tensor", "scheme", f"is {scheme}", _field(scheme=scheme))

    # Scales.
    for base in QUANTIZED:
        for name in ("w13_scale", "w2_scale"):
            bad(base, name, "is None", _field(**{name: None}))
            bad(base, name, "is a list", _of_field(name, lambda t: t.tolist()))
            bad(base, name, "is float64", _of_field(name, lambda t: t.double()))
            bad(base, name, "is an integer", _of_field(name, lambda t: t.int()))
            bad(base, name, "has another E", _of_field(name, lambda t: t[:-1]))
            bad(base, name, "has one dimension too many", _of_field(name, lambda t: t[..., None, None]))
            bad(base, name, "is on another device", _of_field(name, on_meta))
            bad(base, name, "is not contiguous", _of_field(name, _not_contiguous))
            if base not in ("fp8_tensor", "fp8_static"):
                bad(base, name, "has another N", _of_field(name, lambda t: t[:, :-1].contiguous()))
            if base.startswith("fp8") or base == "int8_w8a8":
                bad(base, name, "is bfloat16", _of_field(name, lambda t: t.bfloat16()))
            else:
                bad(base, name, "is float16 beside bfloat16", _of_field(name, lambda t: t.half()))
            for what, value in (("NaN", float("nan")), ("infinite", float("inf")), ("zero", 0.0), ("negative", -1.0)):
                bad(base, name, f"is {what}", _of_field(name, lambda t, v=value: t * 0 + v), debug=True)
    for base in ("fp8_block", "int8_group", "int4"):
        for name in ("w13_scale", "w2_scale"):
            bad(base, name, "has a column too many", _of_field(name, lambda t: t.repeat(1, 1, 2)))
    bad(
        "fp8_block", "w13_scale", "has one grid for both parts", _of_field("w13_scale", lambda t: t[:, :1].contiguous())
    )
    bad(
        "fp8_tensor",
        "w2_scale",
        "is one a channel beside one an expert",
        _of_field("w2_scale", lambda t: t.new_ones(E, H)),
    )
    bad(
        "fp8_channel",
        "w2_scale",
        "is one an expert beside one a channel",
        _of_field("w2_scale", lambda t: t.new_ones(E)),
    )
    bad("int8_channel", "w13_scale", "is one an expert", _of_field("w13_scale", lambda t: t.new_ones(E)))
    bad("int8_w8a8", "w13_scale", "is one an expert", _field(w13_scale=torch.ones(E), w2_scale=torch.ones(E)))

    # Blocks and groups.
    for base, shapes in {
        "fp8_block": (None, 16, (16,), (16, 16, 16), (0, 16), (16, 0), (16, 24), (16, 8), (-16, 16), (16.0, 16.0)),
        "fp8_tensor": ((16, 16),),
        "int8_w8a8": ((16, 16), (0, 16)),
        "int8_channel": ((0, 16),),
        "int8_group": (None, (16, 16), (0, 8), (0, 24), (0, 48)),
        "int4": (None, (16, 16), (0, 0), (0, 8), (0, 48), (0, 32), "0,16"),
    }.items():
        for shape in shapes:
            # Without a shape, or with one that the scales do not have, the scales are what does not fit.
            of_scale = (shape is None and base != "int4") or base in ("fp8_tensor", "int8_channel")
            bad(base, "w13_scale" if of_scale else "block_shape", f"is for {shape}", _field(block_shape=shape))

    # Zero points.
    for name, other in (("w13_zero_point", "w2_zero_point"), ("w2_zero_point", "w13_zero_point")):
        bad("int4_zeros", name, "is missing beside the other", _field(**{name: None}))
        bad("int4_zeros", name, "is a list", _of_field(name, lambda t: t.tolist()))
        bad("int4_zeros", name, "is int8", _of_field(name, lambda t: t.view(torch.int8)))
        bad("int4_zeros", name, "is not packed", _of_field(name, lambda t: t.repeat(1, 2, 1)))
        bad("int4_zeros", name, "has another E", _of_field(name, lambda t: t[:-1]))
        bad("int4_zeros", name, "has a column too many", _of_field(name, lambda t: t.repeat(1, 1, 2)))
        bad("int4_zeros", name, "is on another device", _of_field(name, on_meta))
        bad("int4_zeros", name, "is not contiguous", _of_field(name, _not_contiguous))
        zeros = {name: torch.zeros(E, I, 2, dtype=torch.uint8), other: None}
        for base in ("fp8_tensor", "int8_w8a8", "int8_group"):
            bad(base, name, "is of another scheme", _field(**zeros))

    # Scales of activations.
    for name in ("a13_scale", "a2_scale"):
        bad("fp8_static", name, "is missing beside the other", _field(**{name: None}))
        bad("fp8_static", name, "is a number", _field(**{name: 0.5}))
        bad("fp8_static", name, "is float64", _of_field(name, lambda t: t.double()))
        bad("fp8_static", name, "is bfloat16", _of_field(name, lambda t: t.bfloat16()))
        bad("fp8_static", name, "has two elements", _of_field(name, lambda t: t.repeat(2)))
        bad("fp8_static", name, "has no element", _of_field(name, lambda t: t[:0]))
        bad("fp8_static", name, "has two dimensions", _of_field(name, lambda t: t[None]))
        bad("fp8_static", name, "is on another device", _of_field(name, on_meta))
        for what, value in (("NaN", float("nan")), ("zero", 0.0), ("negative", -1.0)):
            bad("fp8_static", name, f"is {what}", _of_field(name, lambda t, v=value: t * 0 + v), debug=True)
    static = _field(a13_scale=torch.ones(1), a2_scale=torch.ones(1))
    for base in ("fp8_block", "fp8_channel", "int8_w8a8", "int8_channel", "int8_group", "int4"):
        bad(base, "a13_scale", "is static", static)
    for base in ("fp8_block", "int8_channel", "int8_group", "int4", "int4_zeros"):
        bad(base, "per_act_token_quant", "is on", _field(per_act_token_quant=True))
    bad("int8_w8a8", "per_act_token_quant", "is off", _field(per_act_token_quant=False))
    bad("fp8_tensor", "per_act_token_quant", "is an int", _field(per_act_token_quant=1))
    bad("fp8_tensor", "per_act_token_quant", "is None", _field(per_act_token_quant=None))

    # Biases.
    for name in ("w13_bias", "w2_bias"):
        bad("bias", name, "is a list", mapped(name, lambda t: t.tolist()))
        bad("bias", name, "is float64", mapped(name, lambda t: t.double()))
        bad("bias", name, "is float16 beside bfloat16", mapped(name, lambda t: t.half()))
        bad("bias", name, "is an integer", mapped(name, lambda t: t.int()))
        bad("bias", name, "has another E", mapped(name, lambda t: t[:-1]))
        bad("bias", name, "has one dimension too few", mapped(name, lambda t: t[0]))
        bad("bias", name, "has one dimension too many", mapped(name, lambda t: t[None]))
        bad("bias", name, "has another N", mapped(name, lambda t: t[:, :-1].contiguous()))
        bad("bias", name, "is on another device", mapped(name, on_meta))
        bad("bias", name, "has strided columns", mapped(name, lambda t: t.repeat_interleave(2, dim=1)[:, ::2]))
    bad("bias", "w13_bias", "has the gate rows alone", mapped("w13_bias", lambda t: t[:, :I].contiguous()))
    bad("bias", "out", "overlaps a bias", lambda good: good | _biased_out(good))
    bad("fp8_channel", "out", "overlaps a scale", lambda good: good | _out_in_scales(good))

    # Activations.
    for activation in ("silu_no_mul", "gelu_no_mul", "relu2_no_mul"):
        bad("", "w13", f"has the rows of a gated activation for {activation}", put(activation=activation))
        bad("relu2", "interleaved", f"is on for {activation}", put(activation=activation, interleaved=True))
    for activation in ("silu", "gelu", "gelu_tanh", "swigluoai"):
        bad("relu2", "w13", f"has half the rows of {activation}", put(activation=activation))
    for base, activation in (("", "silu"), ("", "gelu"), ("", "gelu_tanh"), ("relu2", "relu2_no_mul")):
        bad(base, "swiglu_alpha", f"is given for {activation}", put(activation=activation, swiglu_alpha=1.0))
        bad(base, "swiglu_limit", f"is given for {activation}", put(activation=activation, swiglu_limit=1.0))
    for name in ("swiglu_alpha", "swiglu_limit"):
        for value in (float("nan"), float("inf"), 0.0, -1.0, "7", None, True):
            bad("swigluoai", name, f"is {value}", put(**{name: value}))
    for value in (1, None, "yes"):
        bad("swigluoai", "interleaved", f"is {value}", put(interleaved=value))
    bad("fp8_block", "interleaved", "is on with scales in blocks", put(interleaved=True))

    # The batched format asks the same questions, of fewer schemes.
    batched = "batched_experts"
    for base in ("int8_w8a8", "int8_channel", "int8_group", "int4", "int4_zeros"):
        bad(base, "quant", "is of a scheme that it does not take", lambda good: good, function=batched)
    for base in ("fp8_tensor", "fp8_block"):
        bad(base, "w2", "is bfloat16", _weights_as(torch.bfloat16), function=batched)
        bad(base, "w13_scale", "has another E", _of_field("w13_scale", lambda t: t[:-1]), function=batched)
        bad(base, "w2_scale", "is float64", _of_field("w2_scale", lambda t: t.double()), function=batched)
        bad(base, "w2_scale", "is NaN", _of_field("w2_scale", lambda t: t * float("nan")), debug=True, function=batched)
        bad(base, "hidden_states", "is float32", mapped("hidden_states", lambda t: t.float()), function=batched)
    for name in ("w13", "w2"):
        bad("", name, "is float8_e4m3fn without scales", mapped(name, lambda t: t.float().to(FP8)), function=batched)
    for name in ("w13_bias", "w2_bias"):
        bad("bias", name, "has another E", mapped(name, lambda t: t[:-1]), function=batched)
        bad("bias", name, "is float64", mapped(name, lambda t: t.double()), function=batched)
    bad("fp8_block", "interleaved", "is on with scales in blocks", put(interleaved=True), function=batched)
    bad("swigluoai", "swiglu_limit", "is 0", put(swiglu_limit=0.0), function=batched)
    bad("", "w13", "has the rows of a gated activation", put(activation="relu2_no_mul"), function=batched)
    return calls


def _out_in_scales(good: dict[str, Any]) -> dict[str, Any]:
    """A result that lies in the memory of w2's scales."""
    return {"out": good["quant"]["w2_scale"].view(torch.bfloat16)[:, :H]}


def _biased_out(good: dict[str, Any]) -> dict[str, Any]:
    """A result that lies in the memory of w2's bias."""
    memory = torch.zeros(E, H, dtype=torch.bfloat16, device=good["w2_bias"].device)
    return {"w2_bias": memory, "out": memory}


BAD_EXPERTS_CALLS: tuple[Call, ...] = tuple(_calls())
