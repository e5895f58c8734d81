"""QUANT: a quantiser of activations does what its format says, element by element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...reference.quantization import LARGEST, grid_step, nearest
from ..cases import QuantizeCase
from ..judge import Verdict, declare
from ..numerics import FLOAT32
from ..quantization_budget import QUANTIZER_ROUNDOFFS


def _has_quantizer(capabilities: Any) -> bool:
    return bool(capabilities.quantizers)


FORM = declare(
    "QUANT-01",
    "values have the shape of the input and the format asked for, scales are float32 of the shape of their granularity",
    "quantize",
    needs=_has_quantizer,
)
SCALE = declare(
    "QUANT-02",
    "a dynamic scale is amax over the largest number of the format to float32 rounding, a static one is the given one",
    "quantize",
    needs=_has_quantizer,
)
ZEROS = declare("QUANT-03", "what is all zero has scale 1 and stays zero", "quantize", needs=_has_quantizer)
RANGE = declare(
    "QUANT-04",
    "every value is finite and no larger than the format's largest: int8 never holds -128",
    "quantize",
    needs=_has_quantizer,
)
NEAREST = declare(
    "QUANT-05",
    "every value is the nearest number of the format to x / scale, ties to even, clamped; beside a midpoint, as near "
    "as float32 division can tell",
    "quantize",
    needs=_has_quantizer,
)
INPUT = declare("QUANT-06", "the input, and the memory around it, is not written", "quantize", needs=_has_quantizer)


def _scale_shape(case: QuantizeCase) -> tuple[int, ...]:
    rows, columns = case.x.shape
    if case.how.static_scale is not None or case.how.granularity == "tensor":
        return (1,)
    return (rows, 1) if case.how.granularity == "token" else (rows, -(-columns // case.how.group))


def _of_elements(case: QuantizeCase, scales: Tensor) -> Tensor:
    """The scale of every element, `[rows, K]` float64."""
    scales = scales.double()
    if scales.ndim == 2 and case.how.granularity == "group":
        scales = scales.repeat_interleave(case.how.group, dim=1)[:, : case.x.shape[1]]
    return scales.expand(case.x.shape)


def judge_quantized(case: QuantizeCase, values: Any, scales: Any) -> list[Verdict]:
    """Every QUANT verdict on one call."""
    x, how = case.x, case.how
    shape = _scale_shape(case)
    holds = (
        isinstance(values, Tensor)
        and isinstance(scales, Tensor)
        and values.shape == x.shape
        and values.dtype == how.dtype
        and scales.shape == shape
        and scales.dtype == torch.float32
        and values.device == x.device == scales.device
    )
    got = [f"{list(t.shape)} {t.dtype} on {t.device}" if isinstance(t, Tensor) else repr(t) for t in (values, scales)]
    wanted = f"{list(x.shape)} {how.dtype} and {list(shape)} torch.float32 on {x.device}"
    changed = case.arena.changed()
    verdicts = [
        FORM.verdict(holds, f"expected {wanted}, got {got[0]} and {got[1]}"),
        INPUT.verdict(not changed, f"written: {changed}"),
    ]
    if not holds or x.numel() == 0:
        return verdicts

    exact, largest = x.double(), LARGEST[how.dtype]
    own, right = _of_elements(case, scales), how.scales(exact)
    off = ((own - right).abs() / right).nan_to_num(torch.inf)
    allowed = 0.0 if how.static_scale is not None else 2 * FLOAT32.unit_roundoff
    verdicts.append(
        SCALE.verdict(
            (off <= allowed).all(),
            _at(off.argmax(), x) + f"expected {_of(right, off.argmax())}, got {_of(own, off.argmax())}",
        )
    )
    numbers = values.double()
    wide = numbers.abs().nan_to_num(torch.inf)
    verdicts.append(
        RANGE.verdict((wide <= largest).all(), _at(wide.argmax(), x) + f"got {_of(numbers, wide.argmax())}")
    )
    if how.static_scale is None:
        zero = _amax(case, exact) == 0
        if zero.any():
            kept = (numbers == 0) & (own == 1)
            verdicts.append(ZEROS.verdict(kept[zero].all(), f"{int((~kept[zero]).sum())} of {int(zero.sum())} are not"))

    # Judged by the subject's own scale, so that each property sees its own fault alone.
    scaled = exact / own
    expected = nearest(scaled, how.dtype)
    # Over a power of two a division is exact; else a float32 one, or a product with the reciprocal, is this far off.
    rounds = torch.frexp(own).mantissa != 0.5
    reach = torch.where(rounds, QUANTIZER_ROUNDOFFS * FLOAT32.unit_roundoff * scaled.abs(), 0.0)
    lower, upper = nearest(scaled - reach, how.dtype), nearest(scaled + reach, how.dtype)
    right_one = (numbers == expected) | (numbers == lower) | (numbers == upper)
    steps = ((numbers - expected).abs() / grid_step(expected.abs(), how.dtype)).nan_to_num(torch.inf)
    worst = torch.where(right_one, 0.0, steps).argmax()
    verdicts.append(
        NEAREST.verdict(
            right_one.all(),
            _at(worst, x) + f"x / scale is {_of(scaled, worst)}, expected {_of(expected, worst)}, got "
            f"{_of(numbers, worst)}; {int((~right_one).sum())} of {x.numel()} are wrong",
        )
    )
    return verdicts


def _amax(case: QuantizeCase, exact: Tensor) -> Tensor:
    """The largest magnitude of what shares each element's scale."""
    if case.how.granularity == "tensor":
        return exact.abs().amax().expand_as(exact)
    width = case.how.group if case.how.granularity == "group" else exact.shape[1]
    return torch.cat([p.abs().amax(dim=1, keepdim=True).expand_as(p) for p in exact.split(width, dim=1)], dim=1)


def _at(index: Tensor, x: Tensor) -> str:
    row, column = divmod(int(index), x.shape[1])
    return f"row {row}, column {column}, x {float(x[row, column]):.9g}: "


def _of(values: Tensor, index: Tensor) -> str:
    return f"{float(values.flatten()[int(index)]):.9g}"
