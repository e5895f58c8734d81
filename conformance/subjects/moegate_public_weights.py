"""What moegate's functions that quantise weights must answer.

Each rule stands here a second time, as it is documented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from ...impl.config import QuantScheme
from ...impl.quantization import ActivationScale
from ...impl.quantize import quantize_activations, quantize_experts, quantize_weights
from ...reference.quantization import nearest
from ..properties.bad_input import Bad, Change, put
from ..properties.public import Answer, PublicCall
from .moegate_public import E, H, I, uneven

_LARGEST = {"fp8_w8a8": 448.0, "int8_w8a8": 127.0, "int8_w8a16": 127.0}
_VALUES = {"fp8_w8a8": torch.float8_e4m3fn, "int8_w8a8": torch.int8, "int8_w8a16": torch.int8}


def _quantized_wrong(w: torch.Tensor, scheme: str, rows: int, columns: int, parts: int) -> Callable[[Any], str]:
    """Scales of runs of `rows` (0: of all) times `columns`, and the nearest values to what is divided by them."""

    def wrong(found: Any) -> str:
        values, scale, zeros = found
        number, n, k = w.shape
        exact, part = w.double(), n // parts
        high = rows or n
        own_scale = torch.empty(number, n, k, dtype=torch.float64)
        amax = torch.empty(number, n, k, dtype=torch.float64)
        flat = scale.double().reshape(number, -1)
        index = 0
        for first in range(0, n, part if rows else n):
            last = first + (part if rows else n)
            for top in range(first, last, high):
                for left in range(0, k, columns):
                    block = (slice(None), slice(top, min(top + high, last)), slice(left, left + columns))
                    amax[block] = exact[block].abs().amax(dim=(1, 2), keepdim=True)
                    own_scale[block] = flat[:, index, None, None]
                    index += 1
        if values.dtype != _VALUES[scheme] or values.shape != w.shape or zeros is not None:
            return f"values {values.dtype} {list(values.shape)}, zero points {zeros}"
        if index != flat.shape[1] or scale.dtype != torch.float32:
            return f"expected {index} scales an expert in float32, got {scale.dtype} {list(scale.shape)}"
        right = torch.where(amax == 0, torch.ones_like(amax), amax / _LARGEST[scheme])
        if not ((own_scale - right).abs() <= 2**-22 * right).all():
            return f"scales are {own_scale.flatten()[:4]}, expected {right.flatten()[:4]}"
        scaled, dtype = exact / own_scale, _VALUES[scheme]
        reach = 2**-22 * scaled.abs()
        low, mid, top_ = (nearest(s, dtype) for s in (scaled - reach, scaled, scaled + reach))
        own = values.double()
        good = (own == low) | (own == mid) | (own == top_)
        return "" if good.all() else f"{int((~good).sum())} of {good.numel()} values are not the nearest"

    return wrong


def _int4_wrong(w: torch.Tensor, group: int, *, zero_points: bool) -> Callable[[Any], str]:
    """Two numbers of 4 bits in a byte, the even one low; 8 is zero where there are no zero points."""

    def unpacked(packed: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.stack((packed & 15, packed >> 4), dim=dim + 1).flatten(dim, dim + 1).double()

    def wrong(found: Any) -> str:
        values, scale, zeros = found
        number, n, k = w.shape
        if values.dtype != torch.uint8 or list(values.shape) != [number, n, k // 2]:
            return f"values {values.dtype} {list(values.shape)}"
        if list(scale.shape) != [number, n, k // group] or (zeros is not None) != zero_points:
            return f"scales {list(scale.shape)}, zero points {zeros}"
        groups = w.double().view(number, n, k // group, group)
        if zeros is None:
            width, zero = groups.abs().amax(dim=3) / 7, torch.full(scale.shape, 8.0, dtype=torch.float64)
        else:
            if zeros.dtype != torch.uint8 or list(zeros.shape) != [number, n // 2, k // group]:
                return f"zero points {zeros.dtype} {list(zeros.shape)}"
            low, high = groups.amin(dim=3).clamp(max=0), groups.amax(dim=3).clamp(min=0)
            width, zero = (high - low) / 15, unpacked(zeros, 1)
            aimed = torch.where(width == 0, 0.0, -low / scale.double())
            if not ((zero - aimed).abs() <= 0.5 + 1e-5).all():
                return f"zero points are {zero.flatten()[:4]}, expected {aimed.flatten()[:4]}"
        right = torch.where(width == 0, torch.ones_like(width), width)
        if not ((scale.double() - right).abs() <= 2**-21 * right).all():
            return f"scales are {scale.flatten()[:4]}, expected {right.flatten()[:4]}"
        steps = groups / scale.double()[..., None] + zero[..., None]
        off = (unpacked(values, 2).view(groups.shape) - steps.clamp(0, 15)).abs()
        return "" if (off <= 0.5 + 1e-4).all() else f"a value is {float(off.max())} steps off"

    return wrong


def _weights_calls() -> list[PublicCall]:
    w = uneven(2, 12, 48, dtype=torch.float32) * torch.logspace(-2, 2, 12)[:, None]
    w[1, 3] = 0.0  # a row of zeros has scale 1
    w[0, 6:9, :16] = 0.0

    def asked(scheme: str, scale: str, shape: tuple[int, int] | None = None, **more: Any) -> Change:
        return put(w=w, scheme=scheme, weight_scale=scale, block_shape=shape, **more)

    cases = [
        Answer("fp8, one scale an expert", _quantized_wrong(w, "fp8_w8a8", 0, 48, 1), asked("fp8_w8a8", "tensor")),
        Answer("fp8, one a channel", _quantized_wrong(w, "fp8_w8a8", 1, 48, 1), asked("fp8_w8a8", "channel")),
        Answer("int8, one a channel", _quantized_wrong(w, "int8_w8a8", 1, 48, 1), asked("int8_w8a8", "channel")),
        Answer("int8, one a group", _quantized_wrong(w, "int8_w8a16", 1, 16, 1), asked("int8_w8a16", "group", (0, 16))),
        *(
            Answer(
                f"fp8 in blocks of {shape}, {parts} parts",
                _quantized_wrong(w, "fp8_w8a8", shape[0], shape[1], parts),
                asked("fp8_w8a8", "block", shape, parts=parts),
            )
            for shape, parts in product(((4, 16), (16, 16), (3, 32)), (1, 2, 3))
        ),
        *(
            Answer(
                f"int4{' with zero points' if zeros else ''}",
                _int4_wrong(w, 16, zero_points=zeros),
                asked("int4_w4a16", "group", (0, 16), zero_points=zeros),
            )
            for zeros in (False, True)
        ),
        Answer(
            "in bfloat16",
            _quantized_wrong(w.bfloat16(), "int8_w8a8", 1, 48, 1),
            put(w=w.bfloat16(), scheme="int8_w8a8", weight_scale="channel", block_shape=None),
        ),
    ]
    good = {"w": w, "scheme": "fp8_w8a8", "weight_scale": "channel", "block_shape": None}

    def experts_wrong(found: Any) -> str:
        w13, w2, quant = found
        first = quantize_weights(
            uneven(E, 2 * I, H), QuantScheme.FP8_W8A8, weight_scale=quant.weight_scale, block_shape=(24, 16), parts=2
        )
        second = quantize_weights(
            uneven(E, H, I), QuantScheme.FP8_W8A8, weight_scale=quant.weight_scale, block_shape=(24, 16)
        )
        same = all(
            torch.equal(own.float(), other.float())
            for own, other in (
                (w13, first[0]),
                (w2, second[0]),
                (quant.w13_scale, first[1]),
                (quant.w2_scale, second[1]),
            )
        )
        return "" if same and quant.block_shape == (24, 16) else "not the weights that quantize_weights gives"

    blocks = {"scheme": "fp8_w8a8", "weight_scale": "block", "block_shape": (24, 16)}
    row = uneven(3, 40, dtype=torch.float32)
    return [
        PublicCall(
            "quantize.quantize_weights",
            quantize_weights,
            lambda: dict(good),
            {},
            (
                Bad("zero_points", "are of fp8", put(zero_points=True)),
                Bad(
                    "w",
                    "has an odd N with zero points",
                    lambda good: asked("int4_w4a16", "group", (0, 16), zero_points=True)(good) | {"w": w[:, :11]},
                ),
                Bad(
                    "w",
                    "has an odd K of int4",
                    lambda good: asked("int4_w4a16", "group", (0, 16))(good) | {"w": w[..., :47].contiguous()},
                ),
                Bad("block_shape", "has a group that does not divide K", asked("int8_w8a16", "group", (0, 32))),
                Bad("block_shape", "stands beside a channel", asked("fp8_w8a8", "channel", (16, 16))),
                Bad("weight_scale", "is of another scheme", asked("int8_w8a8", "tensor")),
            ),
            edges=[
                ("no experts", put(w=w[:0])),
                ("one row", put(w=w[:, :1])),
                ("an odd K", put(w=w[..., :47].contiguous())),
            ],
            answers=cases,
        ),
        PublicCall(
            "quantize.quantize_experts",
            quantize_experts,
            lambda: {"w13": uneven(E, 2 * I, H), "w2": uneven(E, H, I)} | blocks,
            {},
            edges=[("nothing gated", put(w13=uneven(E, I, H), is_gated=False))],
            answers=[Answer("each of both", experts_wrong)],
        ),
        PublicCall(
            "quantize.quantize_activations",
            quantize_activations,
            lambda: {
                "x": row,
                "dtype": torch.int8,
                "scale": "static",
                "static_scale": torch.ones(1),
                "backend": "torch",
            },
            {},
            (
                Bad("static_scale", "has two elements", put(static_scale=torch.ones(2))),
                Bad("static_scale", "is bfloat16", put(static_scale=torch.ones(1).bfloat16())),
                Bad("static_scale", "is on another device", put(static_scale=torch.ones(1, device="meta"))),
                Bad("static_scale", "is a number", put(static_scale=1.0)),
            ),
            edges=[("a scale without dimensions", put(static_scale=torch.tensor(1.0))), ("no rows", put(x=row[:0]))],
            answers=list(_nan_answers()),
        ),
    ]


def _nan_answers() -> Iterator[Answer]:
    """A NaN reaches what shares its scale and nothing else, wherever in a row of several steps it stands."""
    clean = uneven(3, 2048, dtype=torch.float32)
    for (scale, columns), place in product(((ActivationScale.TOKEN, 2048), (ActivationScale.GROUP, 128)), (5, 1500)):
        group = columns if scale is ActivationScale.GROUP else 0
        x = clean.clone()
        x[1, place] = torch.nan

        def wrong(found: Any, scale: ActivationScale = scale, group: int = group, at: int = place // columns) -> str:
            values, scales = found
            right_values, right = quantize_activations(clean, torch.int8, scale, group=group, backend="torch")
            beside = torch.zeros_like(right, dtype=torch.bool)
            beside[1, at] = True
            apart = beside.logical_not().repeat_interleave(2048 // right.shape[1], dim=1)
            if not scales[beside].isnan().all():
                return f"the scale beside a NaN is {scales[beside].tolist()}"
            same = torch.equal(scales[~beside], right[~beside]) and torch.equal(values[apart], right_values[apart])
            return "" if same else "a NaN changes what has another scale"

        asked = {"x": x, "scale": scale, "group": group, "static_scale": None, "backend": None}
        yield Answer(f"a NaN at {place}, a scale a {scale}", wrong, put(**asked))


WEIGHT_CALLS: tuple[PublicCall, ...] = tuple(_weights_calls())
