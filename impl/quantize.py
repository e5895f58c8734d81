"""From high precision to few bits: activations before a GEMM, and weights when a checkpoint is prepared.

The formats are those of `quantization.py`. Rounding is to nearest, ties to even, after a true float32 division.
"""

from __future__ import annotations

import torch

from .checks import FLOATS, expect_bool, expect_int, expect_one_of, expect_tensor
from .config import QuantScheme, expect_block_shape
from .kernels.device import current_device
from .kernels.quantize import quantize_rows
from .platform import Platform
from .quantization import LARGEST, ActivationScale, ExpertsQuantization, WeightScale

_SCALES_OF_SCHEME = {
    QuantScheme.FP8_W8A8: (WeightScale.TENSOR, WeightScale.CHANNEL, WeightScale.BLOCK),
    QuantScheme.INT8_W8A8: (WeightScale.CHANNEL,),
    QuantScheme.INT8_W8A16: (WeightScale.CHANNEL, WeightScale.GROUP),
    QuantScheme.INT4_W4A16: (WeightScale.GROUP,),
}


def quantize_activations(
    x: torch.Tensor,
    dtype: torch.dtype,
    scale: ActivationScale,
    *,
    group: int = 0,
    static_scale: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` in few bits: values = round(clamp(x / scale, -largest, largest)), with largest 448 (fp8) or 127 (int8).

    A dynamic scale is amax / largest of what shares it, 1 where all of that is zero (Micikevicius et al.,
    arXiv 2209.05433; groups as in DeepSeek-V3, arXiv 2412.19437). Nothing waits for the device.

    Args:
        x: [rows, K] bfloat16, float16 or float32, rows contiguous.
        dtype: float8_e4m3fn or int8.
        scale: what shares one scale.
        group: columns that share one scale, the last of which may be narrower; of `ActivationScale.GROUP` alone.
        static_scale: float32 of one element; of `ActivationScale.STATIC` alone.
        backend: "triton", "torch" or None: Triton wherever it runs.

    Returns:
        values: [rows, K] of `dtype`, dense.
        scales: float32 [1] (tensor, static), [rows, 1] (token) or [rows, ceil(K / group)] (group).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or range, by name; "triton" where it
            does not run.
    """
    expect_tensor("x", x, shape=("rows", "K"), dtypes=FLOATS)
    if dtype not in LARGEST:
        raise TypeError(f"dtype: expected {' or '.join(str(known) for known in LARGEST)}, got {dtype}")
    kinds = [kind for kind in ActivationScale if kind is not ActivationScale.NONE]
    if scale not in kinds:
        raise ValueError(f"scale: expected one of {[str(kind) for kind in kinds]}, got {scale!r}")
    scale = ActivationScale(scale)
    if scale is ActivationScale.GROUP:
        expect_int("group", group, low=1)
    elif group:
        raise ValueError(f"group: expected 0 for the scale {scale}, got {group}")
    if scale is ActivationScale.STATIC:
        shape = (1,) if not isinstance(static_scale, torch.Tensor) or static_scale.ndim else ()
        expect_tensor("static_scale", static_scale, shape=shape, dtypes=(torch.float32,), like=x)
    elif static_scale is not None:
        raise ValueError(f"static_scale: expected None for the scale {scale}, got {type(static_scale).__name__}")
    runs_triton = Platform.of(x.device).runs_triton
    if backend is None:
        backend = "triton" if runs_triton else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend: expected 'triton', 'torch' or None, got {backend!r}")
    if backend == "triton":
        if not runs_triton:
            raise ValueError(f"backend: expected 'torch' where Triton does not run, got 'triton' on {x.device}")
        with current_device(x):
            return quantize_rows(x, dtype, scale, group, static_scale)
    return quantize_with_torch(x, dtype, scale, group, static_scale)


def quantize_with_torch(
    x: torch.Tensor, dtype: torch.dtype, scale: ActivationScale, group: int, static_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_activations` in plain torch, on checked arguments."""
    largest = LARGEST[dtype]
    x = x.float()
    num_rows, num_columns = x.shape
    if static_scale is not None:
        scales = divisor = static_scale.reshape(1)
    else:
        # A NaN makes its scale NaN, and with it everything that shares the scale.
        magnitudes = x.abs()
        if scale is ActivationScale.TENSOR:
            amax = magnitudes.amax().reshape(1) if x.numel() else x.new_zeros(1)
        elif scale is ActivationScale.TOKEN:
            amax = magnitudes.amax(dim=1, keepdim=True) if num_columns else x.new_zeros(num_rows, 1)
        else:
            padded = torch.nn.functional.pad(magnitudes, (0, -num_columns % group))
            amax = padded.view(num_rows, padded.shape[1] // group, group).amax(dim=2)
        scales = divisor = _dynamic(amax, largest)
        if scale is ActivationScale.GROUP:
            divisor = scales.repeat_interleave(group, dim=1)[:, :num_columns]
    scaled = (x / divisor).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def dequantize_activations(values: torch.Tensor, scales: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """`values * scales` in float32, rounded to `dtype`; arguments as `quantize_activations` gives them, checked."""
    if group:
        scales = scales.repeat_interleave(group, dim=1)[:, : values.shape[1]]
    return (values.float() * scales).to(dtype)


def _dynamic(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """The scale that brings the largest magnitude to the end of the range; 1 where all is zero."""
    # By a tensor: torch divides by a number on a GPU as by its reciprocal, which rounds otherwise.
    return torch.where(amax == 0, torch.ones_like(amax), amax / torch.full_like(amax, largest))


def quantize_weights(
    w: torch.Tensor,
    scheme: QuantScheme,
    *,
    weight_scale: WeightScale,
    block_shape: tuple[int, int] | None = None,
    zero_points: bool = False,
    parts: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weights in few bits, each rounded to the nearest value that its scale allows; for preparing checkpoints.

    Symmetric scales are amax / largest with largest 448 (fp8), 127 (int8) or 7 (int4, whose values reach from -8 to
    7); with zero points the range from the smallest to the largest value, 0 in it, is cut in 15 steps. A scale is 1
    where all that share it is zero.

    Args:
        w: [E, N, K] bfloat16, float16 or float32.
        scheme: a quantised one.
        weight_scale: what shares one scale.
        block_shape: (bn, bk) of blocks, (0, g) of groups along K, None otherwise.
        zero_points: of int4: a zero for each group.
        parts: equal parts of the rows at which the grid of blocks starts anew: 2 for a gated w13.

    Returns:
        values: [E, N, K] float8_e4m3fn or int8; int4 [E, N, K / 2] uint8.
        scale: float32 [E], [E, N], [E, parts * ceil(N / parts / bn), ceil(K / bk)] or [E, N, K / g].
        zero_point: [E, N / 2, K / g] uint8, or None.

    Raises:
        TypeError, ValueError: an argument out of its range, or that the scheme does not have, by name.
    """
    expect_tensor("w", w, shape=("E", "N", "K"), dtypes=FLOATS)
    scheme = QuantScheme(expect_one_of("scheme", scheme, _SCALES_OF_SCHEME))
    known = _SCALES_OF_SCHEME[scheme]
    if weight_scale not in known:
        raise ValueError(f"weight_scale: expected one of {[str(s) for s in known]} for {scheme}, got {weight_scale!r}")
    shape = expect_block_shape(scheme, block_shape)
    needs_shape = weight_scale in (WeightScale.BLOCK, WeightScale.GROUP)
    if needs_shape != (shape is not None):
        wanted = "two integers" if needs_shape else "None"
        raise ValueError(f"block_shape: expected {wanted} for the scale {weight_scale}, got {block_shape}")
    expect_bool("zero_points", zero_points)
    expect_int("parts", parts, low=1)
    _, n, k = w.shape
    is_int4 = scheme is QuantScheme.INT4_W4A16
    if n % parts:
        raise ValueError(f"parts: expected a divisor of {n} rows, got {parts}")
    if zero_points and not is_int4:
        raise ValueError(f"zero_points: expected False for scheme {scheme}, got True")
    if zero_points and n % 2:
        raise ValueError(f"w: expected an even N with zero_points, got {n}")
    if is_int4 and k % 2:
        raise ValueError(f"w: expected an even K for scheme {scheme}, got {k}")
    if weight_scale == WeightScale.GROUP and shape is not None and k % shape[1]:
        raise ValueError(f"block_shape: expected a group that divides {k} columns, got {shape[1]}")

    # One expert at a time: the whole in float32 would need four times the memory of what it becomes. A rank without
    # experts takes the shapes of one that is not there.
    matrices = w.unbind() or (w.new_zeros(n, k),)
    experts = [_quantize_matrix(matrix.float(), scheme, weight_scale, shape, zero_points, parts) for matrix in matrices]
    values = torch.stack([of_one[0] for of_one in experts])[: len(w)]
    scale = torch.stack([of_one[1] for of_one in experts])[: len(w)]
    zeros = [of_one[2] for of_one in experts if of_one[2] is not None]
    return values, scale, torch.stack(zeros)[: len(w)] if zeros else None


def _quantize_matrix(
    w: torch.Tensor,
    scheme: QuantScheme,
    weight_scale: WeightScale,
    block_shape: tuple[int, int] | None,
    zero_points: bool,
    parts: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One expert's `w [N, K]` float32; returns as `quantize_weights`, without E."""
    n, k = w.shape
    rows, columns = block_shape or (0, k)
    if scheme is QuantScheme.INT4_W4A16:
        return _quantize_int4(w.view(n, k // columns, columns), zero_points)
    dtype = torch.float8_e4m3fn if scheme is QuantScheme.FP8_W8A8 else torch.int8
    largest = LARGEST[dtype]
    magnitudes = w.abs()
    match weight_scale:
        case WeightScale.TENSOR:
            scale = divisor = _dynamic(magnitudes.amax(), largest)
        case WeightScale.CHANNEL:
            scale = _dynamic(magnitudes.amax(dim=1), largest)
            divisor = scale[:, None]
        case WeightScale.GROUP:
            scale = _dynamic(magnitudes.view(n, k // columns, columns).amax(dim=2), largest)
            divisor = scale.repeat_interleave(columns, dim=1)
        case WeightScale.BLOCK:
            part = n // parts
            padded = torch.nn.functional.pad(magnitudes.view(parts, part, k), (0, -k % columns, 0, -part % rows))
            grid = padded.view(parts, padded.shape[1] // rows, rows, padded.shape[2] // columns, columns)
            blocks = _dynamic(grid.amax(dim=(2, 4)), largest)
            scale = blocks.flatten(0, 1)
            spread = blocks.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2)
            divisor = spread[:, :part, :k].reshape(n, k)
    scaled = (w / divisor).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale, None


def _quantize_int4(groups: torch.Tensor, zero_points: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`groups [N, K / g, g]` float32."""
    if zero_points:
        low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
        scale = _dynamic(high - low, 15.0)
        zeros = (-low / scale).round().clamp(0, 15)
    else:
        scale = _dynamic(groups.abs().amax(dim=2), 7.0)
        zeros = torch.full_like(scale, 8.0)
    steps = ((groups / scale[..., None]).round() + zeros[..., None]).clamp(0, 15)
    values = _pack(steps.flatten(1), dim=1)
    return values, scale, _pack(zeros, dim=0) if zero_points else None


def _pack(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Pairs of 4-bit numbers along `dim` in one byte, the even one in the low nibble."""
    pairs = values.to(torch.uint8).unflatten(dim, (-1, 2))
    low, high = pairs.unbind(dim + 1)
    return low | (high << 4)


def quantize_experts(
    w13: torch.Tensor,
    w2: torch.Tensor,
    scheme: QuantScheme,
    *,
    weight_scale: WeightScale,
    block_shape: tuple[int, int] | None = None,
    zero_points: bool = False,
    per_act_token_quant: bool = False,
    a13_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    is_gated: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, ExpertsQuantization]:
    """Both weights of a layer's experts in few bits, as `fused_experts` takes them.

    Args:
        w13: [E_local, 2I, H], or [E_local, I, H] where nothing is gated.
        w2: [E_local, H, I].
        scheme: a quantised one.
        weight_scale: what shares one scale of a weight.
        block_shape: of blocks or groups.
        zero_points: of int4.
        per_act_token_quant: of `ExpertsQuantization`.
        a13_scale: static, or None.
        a2_scale: static, or None.
        is_gated: w13 holds gate rows and up rows.

    Returns:
        w13, w2, and how they are stored.

    Raises:
        TypeError, ValueError: as `quantize_weights` and `ExpertsQuantization`, before anything is computed; weights of
            different E or H.
    """
    expect_bool("is_gated", is_gated)
    expect_bool("per_act_token_quant", per_act_token_quant)
    expect_tensor("w2", w2, shape=("E_local", "H", "I"), dtypes=FLOATS)
    rows = (2 if is_gated else 1) * w2.shape[2]
    expect_tensor("w13", w13, shape=(w2.shape[0], rows, w2.shape[1]), dtypes=FLOATS, like=w2)
    options = {"weight_scale": weight_scale, "block_shape": block_shape, "zero_points": zero_points}
    w13, w13_scale, w13_zero_point = quantize_weights(w13, scheme, parts=2 if is_gated else 1, **options)
    w2, w2_scale, w2_zero_point = quantize_weights(w2, scheme, **options)
    quant = ExpertsQuantization(
        scheme,
        w13_scale,
        w2_scale,
        w13_zero_point,
        w2_zero_point,
        block_shape,
        a13_scale,
        a2_scale,
        per_act_token_quant,
    )
    return w13, w2, quant
