"""Quantising activations and weights in plain torch: bit for bit as the reference does it, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moegate.impl.config import QuantScheme
from moegate.impl.platform import Platform
from moegate.impl.quantization import ActivationScale, WeightScale
from moegate.impl.quantize import LARGEST, quantize_activations, quantize_experts, quantize_weights
from moegate.reference.quantization import ActivationQuantization, QuantizedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(
    not Platform.of(DEVICE).runs_triton, reason="Triton runs on a GPU, or with TRITON_INTERPRET=1"
)
DTYPES = pytest.mark.parametrize("dtype", LARGEST, ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernel)])


def spread(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of widely spread magnitudes, zeros among them."""
    generator = torch.Generator().manual_seed(3)
    magnitudes = 2.0 ** torch.randint(-12, 4, shape, generator=generator)
    values = torch.randn(shape, generator=generator) * magnitudes
    return torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, values).to(DEVICE, dtype)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("scale", "group"), [("tensor", 0), ("token", 0), ("group", 16), ("group", 32), ("group", 128)]
)
def test_activations_are_quantised_bit_for_bit_as_the_reference_does(
    scale: str, group: int, of: torch.dtype, dtype: torch.dtype, backend: str
) -> None:
    x = spread(7, 80, dtype=of)
    x[2] = 0
    x[3, 16:32] = 0
    values, scales = quantize_activations(x, dtype, ActivationScale(scale), group=group, backend=backend)
    # On the CPU: on a GPU torch divides a tensor by a number as a product with its reciprocal, which is not the same.
    want, of_elements = ActivationQuantization(dtype, scale, group).quantize(x.float().cpu())
    assert torch.equal(values.cpu().view(torch.uint8), want.view(torch.uint8))
    assert scales.shape == {"tensor": (1,), "token": (7, 1), "group": (7, -(-80 // max(group, 1)))}[scale]
    assert scales.dtype == torch.float32
    each = scales if group == 0 else scales.repeat_interleave(group, dim=1)[:, :80]
    assert torch.equal(each.expand(7, 80).cpu(), of_elements)


@BACKENDS
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_static_scale_clamps_what_is_beyond_it(shape: tuple[int, ...], backend: str) -> None:
    x = torch.tensor([[1000.0, -1000.0, 3.0, 0.0]], device=DEVICE)
    static = torch.full(shape, 0.5, device=DEVICE)
    values, scales = quantize_activations(
        x, torch.float8_e4m3fn, ActivationScale.STATIC, static_scale=static, backend=backend
    )
    assert values.float().tolist() == [[448.0, -448.0, 6.0, 0.0]]
    assert scales.tolist() == [0.5]


@BACKENDS
@pytest.mark.parametrize("scale", ["tensor", "token", "group"])
def test_a_nan_is_never_hidden(scale: str, backend: str) -> None:
    x = spread(3, 32)
    x[1, 20] = float("nan")
    values, scales = quantize_activations(
        x, torch.float8_e4m3fn, ActivationScale(scale), group=16 if scale == "group" else 0, backend=backend
    )
    each = scales.repeat_interleave(16, dim=1) if scale == "group" else scales.expand(3, 32)
    assert (values.float() * each)[1, 20].isnan()
    if scale != "tensor":
        assert (values.float() * each)[0].isfinite().all()


@DTYPES
@pytest.mark.parametrize("scale", ["tensor", "token", "group"])
def test_no_rows_are_quantised_to_none(scale: str, dtype: torch.dtype) -> None:
    group = 16 if scale == "group" else 0
    x = torch.empty(0, 32, device=DEVICE)
    values, scales = quantize_activations(x, dtype, ActivationScale(scale), group=group, backend="torch")
    assert values.shape == (0, 32)
    assert scales.shape == {"tensor": (1,), "token": (0, 1), "group": (0, 2)}[scale]


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    values, _ = quantize_activations(x, torch.int8, ActivationScale.TOKEN, backend="torch")
    assert values.tolist() == [[127, 0, 2, 2, 0, -2]]


WEIGHTS = [
    *((QuantScheme.FP8_W8A8, scale, None, False) for scale in (WeightScale.TENSOR, WeightScale.CHANNEL)),
    *((QuantScheme.FP8_W8A8, WeightScale.BLOCK, shape, False) for shape in ((128, 128), (16, 32), (1, 16), (5, 48))),
    (QuantScheme.INT8_W8A8, WeightScale.CHANNEL, None, False),
    (QuantScheme.INT8_W8A16, WeightScale.CHANNEL, None, False),
    (QuantScheme.INT8_W8A16, WeightScale.GROUP, (0, 32), False),
    *((QuantScheme.INT4_W4A16, WeightScale.GROUP, (0, 32), zeros) for zeros in (False, True)),
]
# The distance between neighbours at the largest value, in units of the scale: what half of is the worst error.
STEP = {QuantScheme.FP8_W8A8: 32.0}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("scheme", "weight_scale", "block_shape", "zeros"), WEIGHTS)
def test_every_weight_is_within_half_a_step_of_what_it_was(
    scheme: QuantScheme,
    weight_scale: WeightScale,
    block_shape: tuple[int, int] | None,
    zeros: bool,
    parts: int,
) -> None:
    w = spread(3, 36, 96, dtype=torch.bfloat16)
    w[1] = 0
    w[2, 5] = 0
    values, scale, zero_point = quantize_weights(
        w, scheme, weight_scale=weight_scale, block_shape=block_shape, zero_points=zeros, parts=parts
    )
    stored = QuantizedWeight(values, scale, zero_point, block_shape, parts)
    assert scale.dtype == torch.float32
    assert scale.is_contiguous()
    assert (zero_point is not None) == zeros
    for e in range(3):
        error = (stored.expert(e) - w[e].double()).abs()
        steps = stored._scales(e, torch.float64) * STEP.get(scheme, 1.0)
        assert (error <= steps / 2 * (1 + (1e-3 if zeros else 1e-4))).all()
        assert error[w[e] == 0].max() == 0
    assert (stored._scales(1, torch.float64) == 1).all()


def test_a_grid_of_blocks_starts_anew_at_the_first_up_row() -> None:
    w = torch.ones(1, 12, 16)
    w[0, 6:] = 448.0
    scale = quantize_weights(w, QuantScheme.FP8_W8A8, weight_scale=WeightScale.BLOCK, block_shape=(4, 16), parts=2)[1]
    assert scale.flatten().tolist() == [pytest.approx(1 / 448)] * 2 + [1.0] * 2


def test_the_even_column_and_the_even_row_are_in_the_low_nibble() -> None:
    w = torch.arange(-8.0, 8.0).repeat(1, 2, 1)
    w[0, 1] = torch.arange(0.0, 16.0)
    values, scale, zero_point = quantize_weights(
        w, QuantScheme.INT4_W4A16, weight_scale=WeightScale.GROUP, block_shape=(0, 16), zero_points=True
    )
    assert scale.flatten().tolist() == [1.0, 1.0]
    assert values[0, 0].tolist() == [2 * i + 16 * (2 * i + 1) for i in range(8)]
    assert zero_point is not None
    assert zero_point.tolist() == [[[8 + 16 * 0]]]


@pytest.mark.parametrize(("scheme", "weight_scale", "block_shape", "zeros"), WEIGHTS)
def test_a_rank_without_experts_has_empty_scales_of_the_right_shape(
    scheme: QuantScheme, weight_scale: WeightScale, block_shape: tuple[int, int] | None, zeros: bool
) -> None:
    options: dict[str, Any] = {"weight_scale": weight_scale, "block_shape": block_shape, "zero_points": zeros}
    some, none = (quantize_weights(torch.ones(e, 32, 96), scheme, **options) for e in (2, 0))
    for one, other in zip(some, none, strict=True):
        if one is None or other is None:
            assert other is None
            assert one is None
        else:
            assert other.shape == (0, *one.shape[1:])
            assert other.dtype == one.dtype


def _activations(**changes: Any) -> None:
    good: dict[str, Any] = {"x": torch.ones(2, 32), "dtype": torch.int8, "scale": ActivationScale.TOKEN}
    quantize_activations(**(good | {"backend": "torch"} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.ones(32)}, "x: expected shape"),
        ({"x": torch.ones(2, 32).long()}, "x: expected dtype"),
        ({"x": torch.ones(32, 2).T}, "x: expected a contiguous last dimension"),
        ({"dtype": torch.uint8}, "dtype: expected torch.float8_e4m3fn or torch.int8, got torch.uint8"),
        ({"dtype": "fp8"}, "dtype: expected"),
        ({"scale": "none"}, "scale: expected one of"),
        ({"scale": "row"}, "scale: expected one of"),
        ({"scale": "group"}, "group: expected at least 1, got 0"),
        ({"scale": "group", "group": 16.0}, "group: expected an int"),
        ({"group": 16}, "group: expected 0 for the scale token, got 16"),
        ({"scale": "static"}, "static_scale: expected a tensor, got NoneType"),
        ({"scale": "static", "static_scale": 0.5}, "static_scale: expected a tensor, got float"),
        ({"scale": "static", "static_scale": torch.ones(2)}, "static_scale: expected shape"),
        ({"scale": "static", "static_scale": torch.ones(1).half()}, "static_scale: expected dtype"),
        ({"scale": "static", "static_scale": torch.ones(1, device="meta")}, "static_scale: expected device"),
        ({"static_scale": torch.ones(1)}, "static_scale: expected None for the scale token"),
        ({"backend": "cuda"}, "backend: expected 'triton', 'torch' or None"),
    ],
)
def test_activations_that_cannot_be_quantised_so_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        _activations(**changes)
    assert words in str(caught.value)


@pytest.mark.skipif(Platform.of("cpu").interpreted, reason="Triton runs on this process's CPU")
def test_triton_is_refused_where_it_does_not_run() -> None:
    with pytest.raises(ValueError, match="backend: expected 'torch' where Triton does not run, got 'triton' on cpu"):
        _activations(backend="triton")


FP8, INT8_16, INT4 = QuantScheme.FP8_W8A8, QuantScheme.INT8_W8A16, QuantScheme.INT4_W4A16


@pytest.mark.parametrize(
    ("w", "scheme", "options", "words"),
    [
        ((8, 32), FP8, {"weight_scale": "tensor"}, "w: expected shape"),
        ((2, 8, 32), "none", {"weight_scale": "tensor"}, "scheme: expected one of"),
        ((2, 8, 32), "fp4", {"weight_scale": "tensor"}, "scheme: expected one of"),
        ((2, 8, 32), FP8, {"weight_scale": "group", "block_shape": (0, 16)}, "weight_scale: expected one of"),
        ((2, 8, 32), INT4, {"weight_scale": "channel"}, "weight_scale: expected one of"),
        ((2, 8, 32), FP8, {"weight_scale": "block"}, "block_shape: expected two integers for the scale block"),
        ((2, 8, 32), FP8, {"weight_scale": "tensor", "block_shape": (16, 16)}, "block_shape: expected None"),
        ((2, 8, 32), FP8, {"weight_scale": "block", "block_shape": (0, 16)}, "block_shape: expected (rows, columns)"),
        ((2, 8, 32), FP8, {"weight_scale": "block", "block_shape": (8, 24)}, "block_shape: expected columns that 16"),
        ((2, 8, 40), INT8_16, {"weight_scale": "group", "block_shape": (0, 16)}, "block_shape: expected a group that"),
        ((2, 8, 33), INT4, {"weight_scale": "group", "block_shape": (0, 16)}, "w: expected an even K"),
        (
            (2, 7, 32),
            INT4,
            {"weight_scale": "group", "block_shape": (0, 16), "zero_points": True},
            "w: expected an even N with zero_points, got 7",
        ),
        ((2, 8, 32), FP8, {"weight_scale": "tensor", "zero_points": True}, "zero_points: expected False"),
        ((2, 8, 32), FP8, {"weight_scale": "tensor", "zero_points": 1}, "zero_points: expected a bool"),
        ((2, 8, 32), FP8, {"weight_scale": "tensor", "parts": 3}, "parts: expected a divisor of 8 rows, got 3"),
        ((2, 8, 32), FP8, {"weight_scale": "tensor", "parts": 0}, "parts: expected at least 1"),
    ],
)
def test_weights_that_cannot_be_quantised_so_are_refused_by_name(
    w: tuple[int, ...], scheme: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        quantize_weights(torch.ones(w), scheme, **options)
    assert words in str(caught.value)


def test_both_weights_of_a_layer_are_quantised_at_once() -> None:
    w13, w2 = spread(2, 64, 32), spread(2, 32, 32)
    q13, q2, quant = quantize_experts(w13, w2, INT4, weight_scale=WeightScale.GROUP, block_shape=(0, 16))
    assert (q13.shape, q2.shape) == ((2, 64, 16), (2, 32, 16))
    assert quant.weight_scale is WeightScale.GROUP
    assert quant.activation_scale is ActivationScale.NONE
