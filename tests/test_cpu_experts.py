"""The CPU backend on quantised experts, biases and every activation, against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from moegate.impl import checks
from moegate.impl.config import Activation, QuantScheme
from moegate.impl.fused_moe import fused_experts
from moegate.impl.quantization import ActivationScale, ExpertsQuantization, WeightScale
from moegate.impl.quantize import quantize_experts
from moegate.reference.activations import Activation as ReferenceActivation
from moegate.reference.experts import experts as reference_experts
from moegate.reference.experts import to_local_ids
from moegate.reference.quantization import ActivationQuantization, QuantizedWeight, expert_weight

M, E, TOP_K = 12, 4, 2
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


@dataclass(frozen=True)
class Scheme:
    """A way to store weights and activations."""

    scheme: QuantScheme
    weight_scale: WeightScale
    block_shape: tuple[int, int] | None = None
    zero_points: bool = False
    per_act_token_quant: bool = False
    is_static: bool = False

    def __str__(self) -> str:
        shape = "" if self.block_shape is None else "-{}x{}".format(*self.block_shape)
        flags = ("-zeros", self.zero_points), ("-token", self.per_act_token_quant), ("-static", self.is_static)
        return f"{self.scheme}-{self.weight_scale}{shape}" + "".join(name for name, is_on in flags if is_on)


FP8, INT8, INT8_16, INT4 = (
    QuantScheme.FP8_W8A8,
    QuantScheme.INT8_W8A8,
    QuantScheme.INT8_W8A16,
    QuantScheme.INT4_W4A16,
)
SCHEMES = (
    *(
        Scheme(FP8, scale, per_act_token_quant=token, is_static=static)
        for scale, (token, static) in product(
            (WeightScale.TENSOR, WeightScale.CHANNEL), ((False, False), (True, False), (False, True))
        )
    ),
    *(Scheme(FP8, WeightScale.BLOCK, shape) for shape in ((128, 128), (32, 16), (16, 64), (1, 48))),
    Scheme(INT8, WeightScale.CHANNEL, per_act_token_quant=True),
    Scheme(INT8_16, WeightScale.CHANNEL),
    Scheme(INT8_16, WeightScale.GROUP, (0, 16)),
    *(Scheme(INT4, WeightScale.GROUP, (0, group), zeros) for group, zeros in product((16, 32), (False, True))),
)
BIASES = pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])


def layer(activation: Activation, h: int, i: int, dtype: torch.dtype, with_bias: bool) -> dict[str, Any]:
    """Plain operands of a layer; some ids are -1, some experts twice as loud."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows = 2 * i if activation.is_gated else i
    ids = torch.stack([torch.randperm(E, generator=generator)[:TOP_K] for _ in range(M)]).to(torch.int32)
    ids[3], ids[5, 1] = -1, -1
    loud = torch.tensor([1.0, 2.0, 0.5, 1.0])[:, None, None]
    operands = {
        "hidden_states": normal(M, h).to(dtype),
        "w13": (normal(E, rows, h) * loud * 2 / h**0.5).to(dtype),
        "w2": (normal(E, h, i) / i**0.5).to(dtype),
        "topk_weights": torch.rand(M, TOP_K, generator=generator),
        "topk_ids": ids,
        "activation": activation,
    }
    if with_bias:
        operands |= {"w13_bias": normal(E, rows).to(dtype), "w2_bias": normal(E, h)}
    return operands


def quantized(operands: dict[str, Any], how: Scheme) -> dict[str, Any]:
    static = torch.tensor([0.01]) if how.is_static else None
    w13, w2, quant = quantize_experts(
        operands["w13"],
        operands["w2"],
        how.scheme,
        weight_scale=how.weight_scale,
        block_shape=how.block_shape,
        zero_points=how.zero_points,
        per_act_token_quant=how.per_act_token_quant,
        a13_scale=static,
        a2_scale=None if static is None else static * 2,
        is_gated=operands["activation"].is_gated,
    )
    return operands | {"w13": w13, "w2": w2, "quant": quant}


def in_reference_words(operands: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the reference."""
    operands = dict(operands)
    quant: ExpertsQuantization | None = operands.pop("quant", None)
    kind = operands.pop("activation")
    parameters = {name: operands.pop(f"swiglu_{name}", default) for name, default in (("alpha", 1.702), ("limit", 7.0))}
    activation = ReferenceActivation(kind.value, interleaved=operands.pop("interleaved", False), **parameters)
    operands["activation"] = activation
    if quant is None:
        return operands
    parts = 2 if activation.is_gated else 1
    of = {"block_shape": quant.block_shape}
    operands["w13"] = QuantizedWeight(operands["w13"], quant.w13_scale, quant.w13_zero_point, parts=parts, **of)
    operands["w2"] = QuantizedWeight(operands["w2"], quant.w2_scale, quant.w2_zero_point, **of)
    kind = quant.activation_scale
    if kind is not ActivationScale.NONE:
        dtype = torch.int8 if quant.scheme is INT8 else torch.float8_e4m3fn
        group = quant.block_shape[1] if quant.block_shape else 0
        for name, scale in (("input", quant.a13_scale), ("hidden", quant.a2_scale)):
            granularity = "tensor" if kind is ActivationScale.STATIC else kind.value
            static = None if scale is None else float(scale)
            operands[f"quantize_{name}"] = ActivationQuantization(dtype, granularity, group, static)
    return operands


def as_declared(words: dict[str, Any]) -> torch.Tensor:
    """The layer in float64, but rounded to storage where the backend says that it rounds, and quantised in float32."""
    x, activation, on_input = words["hidden_states"], words["activation"], words.get("apply_router_weight_on_input")
    dtype = x.dtype

    def quantised(rows: torch.Tensor, name: str) -> torch.Tensor:
        how = words.get(f"quantize_{name}")
        return rows.double() if how is None or not len(rows) else how.rounded(rows.float()).double()

    ids = to_local_ids(words["topk_ids"], words.get("expert_map"))
    pairs = [(t, s, int(ids[t, s])) for t, s in (ids >= 0).nonzero().tolist()]
    x = quantised(x, "input")
    hidden = []
    for t, s, e in pairs:
        rows = expert_weight(words["w13"], e, torch.float64) @ x[t]
        rows = rows * words["topk_weights"][t, s].double() if on_input else rows
        rows = rows if "w13_bias" not in words else rows + words["w13_bias"][e].double()
        hidden.append(activation(*activation.split(rows.to(dtype).double())).to(dtype))
    hidden = quantised(torch.stack(hidden), "hidden")
    out = torch.zeros(x.shape, dtype=torch.float64)
    for (t, s, e), row in zip(pairs, hidden, strict=True):
        y = expert_weight(words["w2"], e, torch.float64) @ row
        y = y if "w2_bias" not in words else y + words["w2_bias"][e].double()
        out[t] += (y if on_input else y * words["topk_weights"][t, s].double()).to(dtype).double()
    return out


def agree(operands: dict[str, Any]) -> None:
    """Each row is what the declared roundings give, but for the last one and for float32 sums.

    On the reference without them it is within a few roundings to storage; where hidden rows are quantised, a value
    that such a rounding moved over the edge of a step is off by the step, 1 / 8 of itself, which some 1 in 50 are.
    """
    with checks.debug_checks():
        got = fused_experts(**operands, backend="cpu")
    words = in_reference_words(operands)
    dtype, size = got.dtype, operands["hidden_states"].shape[1] + operands["w2"].shape[2]
    sums = 4 * size**0.5 * 2**-24
    is_rounded_twice = "quantize_hidden" in words
    whole = reference_experts(**words)
    assert isinstance(whole, torch.Tensor)
    for want, allowed in (
        (as_declared(words), EPSILON[dtype] + sums),
        (whole, 0.06 if is_rounded_twice else 6 * EPSILON[dtype] + sums),
    ):
        error = (got.double() - want).norm(dim=1)
        assert (error <= allowed * want.norm(dim=1)).all(), (error / want.norm(dim=1) / allowed).nan_to_num().max()
    assert dtype == operands["hidden_states"].dtype
    assert not got[3].any()  # a token without any pair


@BIASES
@pytest.mark.parametrize("how", SCHEMES, ids=str)
def test_every_scheme_means_what_the_reference_says(how: Scheme, with_bias: bool) -> None:
    agree(
        quantized(layer(Activation.SILU, 96, 80 if how.block_shape != (0, 32) else 64, torch.bfloat16, with_bias), how)
    )


@pytest.mark.parametrize("how", SCHEMES, ids=str)
def test_a_weight_without_a_gate_has_one_grid_of_scales(how: Scheme) -> None:
    agree(quantized(layer(Activation.RELU2_NO_MUL, 64, 96, torch.float16, False), how))


@BIASES
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("activation", Activation)
def test_every_activation_means_what_the_reference_says(
    activation: Activation, dtype: torch.dtype, with_bias: bool
) -> None:
    agree(layer(activation, 33, 17, dtype, with_bias))


@pytest.mark.parametrize("activation", [kind for kind in Activation if kind.is_gated])
def test_gate_and_up_rows_may_alternate(activation: Activation) -> None:
    agree(layer(activation, 32, 24, torch.bfloat16, True) | {"interleaved": True})
    for how in (SCHEMES[3], SCHEMES[10], SCHEMES[-1]):
        operands = quantized(layer(activation, 32, 32, torch.bfloat16, True), how)
        agree(operands | {"interleaved": True})


@pytest.mark.parametrize(("alpha", "limit"), [(1.0, 7.0), (1.702, 0.5), (3.0, 1.25)])
def test_alpha_and_limit_are_those_of_the_call(alpha: float, limit: float) -> None:
    operands = layer(Activation.SWIGLUOAI, 32, 24, torch.float32, True)
    agree(operands | {"swiglu_alpha": alpha, "swiglu_limit": limit})


@pytest.mark.parametrize("how", [None, SCHEMES[0], SCHEMES[6], SCHEMES[-1]], ids=str)
def test_a_bias_is_not_multiplied_by_a_weight_on_the_input(how: Scheme | None) -> None:
    operands = layer(Activation.SILU, 32, 32, torch.bfloat16, True)
    operands["topk_ids"], operands["topk_weights"] = (
        operands[n][:, :1].contiguous() for n in ("topk_ids", "topk_weights")
    )
    operands = operands if how is None else quantized(operands, how)
    agree(operands | {"apply_router_weight_on_input": True})


@pytest.mark.parametrize("how", [SCHEMES[0], SCHEMES[2], SCHEMES[6], SCHEMES[-1]], ids=str)
def test_the_scale_of_all_rows_is_that_of_the_pairs_held_here(how: Scheme) -> None:
    operands = layer(Activation.SILU, 32, 32, torch.bfloat16, True)
    operands["expert_map"] = torch.tensor([1, -1, -1, 0], dtype=torch.int32)
    for name in ("w13", "w2", "w13_bias", "w2_bias"):
        operands[name] = operands[name][[3, 0]].contiguous()
    agree(quantized(operands, how))


@pytest.mark.parametrize("how", SCHEMES, ids=str)
def test_a_rank_without_experts_or_tokens_gives_zeros(how: Scheme) -> None:
    operands = layer(Activation.SILU, 64, 64, torch.bfloat16, True)
    nobody = operands | {name: operands[name][:0] for name in ("w13", "w2", "w13_bias", "w2_bias")}
    nobody["expert_map"] = torch.full((E,), -1, dtype=torch.int32)
    assert not fused_experts(**quantized(nobody, how), backend="cpu").any()
    no_pair = quantized(operands | {"topk_ids": torch.full((M, TOP_K), -1, dtype=torch.int32)}, how)
    assert not fused_experts(**no_pair, backend="cpu").any()
    no_token = {name: operands[name][:0] for name in ("hidden_states", "topk_ids", "topk_weights")}
    assert fused_experts(**quantized(operands | no_token, how), backend="cpu").shape == (0, 64)


def test_the_tails_of_activations_keep_their_digits() -> None:
    """Where 1 + erf and 1 + tanh cancel, at gates far below zero."""
    for activation in (Activation.GELU_NO_MUL, Activation.GELU_TANH, Activation.SILU_NO_MUL):
        operands = layer(activation, 16, 16, torch.float32, True)
        operands["w2_bias"] = torch.zeros(E, 16)
        rows = operands["w13_bias"].shape[1]
        operands["w13"] *= 1e-3
        operands["w13_bias"] = torch.full((E, rows), -4.5)
        agree(operands)
