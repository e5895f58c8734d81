"""What quantising activations adds to the error budget: values that flip to their neighbour, and scales that move.

The reference quantises as the format says, so a quantised value differs from its own by a step only where the value
before rounding may lie on the other side of a midpoint: a *flip*, whose probability follows from that value's
uncertainty and its distance from the midpoint. Everything that does not flip is exact, but for the scale: a dynamic
scale has the relative error of the largest magnitude that it comes from, and all that share it move together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..reference.quantization import LARGEST, ActivationQuantization, grid_step, nearest
from .numerics import FLOAT32, Format

# Rarer flips than this are not provided for: uncertainties are sums of largest errors, which are sqrt(3) times their
# standard errors, so that a normal error that flips so rarely in truth hardly ever does.
NEVER = 1e-4
# A flip that happens costs a whole step however rare it is: at a variance of a quarter that is two sigma, and leaves
# room for what else goes wrong beside it. A flip of the layer's input moves all that follows it, and there makes others
# flip: it is provided for as if it happened.
RARE = 1 / 4
RARE_INPUT = 1.0
# Unit roundoffs of amax / largest and of x / scale in float32: an approximate division is good to 2 ulp, and so is a
# product with the rounded reciprocal.
QUANTIZER_ROUNDOFFS = 4.0
# Elements this many sigma under the largest magnitude may be the largest one of an honest implementation.
NEAR = 4.0


@dataclass(frozen=True)
class Flips:
    """Squared errors of rounding to a grid, each element for itself.

    Attributes:
        variance: with every possible flip counted at least as `rare` says: for what a single flip may decide.
        typical: each flip at its chance: for sums over many elements.
        single: the largest that one flip of this element costs, 0 where none is possible.
    """

    variance: Tensor
    typical: Tensor
    single: Tensor


def flips(scaled: Tensor, sigma: Tensor, dtype: torch.dtype, rare: float = RARE) -> Flips:
    """What rounding values that are only known to `sigma` to the grid of `dtype` may cost, in the units of `scaled`.

    Args:
        scaled: the reference's values over their scales, before clamping and rounding.
        sigma: of them; where it is zero nothing flips, ties included.
        dtype: float8_e4m3fn or int8.
        rare: the least that a possible flip counts, in squared steps.
    """
    largest = LARGEST[dtype]
    magnitude = scaled.abs()
    rounded = nearest(magnitude, dtype)
    above = grid_step(rounded, dtype)
    # Just below a power of two the numbers lie closer: the step there is that of anything smaller.
    below = torch.where(rounded == 0, above, grid_step(rounded - above / 4, dtype))
    # Beyond half a step a value may cross several midpoints: then its own error counts.
    wide = torch.where(sigma > above / 2, sigma**2, 0.0)
    variance, typical, single = wide, wide, wide
    for step, distance in ((above, rounded + above / 2 - magnitude), (below, magnitude - rounded + below / 2)):
        chance = torch.erfc(distance.clamp(min=0) / (sigma * math.sqrt(2)).clamp(min=torch.finfo(sigma.dtype).tiny)) / 2
        if step is above:
            chance = torch.where(rounded >= largest, 0.0, chance)  # what is clamped has no number above it
        possible = (sigma > 0) & (chance >= NEVER)
        variance = variance + torch.where(possible, chance.clamp(min=rare) * step**2, 0.0)
        typical = typical + torch.where(possible, chance * step**2, 0.0)
        single = torch.maximum(single, torch.where(possible, step**2, 0.0))
    return Flips(variance, typical, single)


# Midpoints whose places on the storage grid are independent: those of one binade of e4m3 (the others lie alike), and
# about all of int8's.
MIDPOINTS = {torch.float8_e4m3fn: 8, torch.int8: 127}


def leaning(how: ActivationQuantization, storage: Format) -> float:
    """The relative error that all elements of one scale share where they are rounded to storage before.

    Values between a midpoint and the storage grid's next one round the wrong way, and all to the same side. Under one
    scale a midpoint lies alike for every element, so such flips do not average out over elements, but over midpoints.
    """
    return storage.unit_roundoff / math.sqrt(MIDPOINTS[how.dtype])


def leant(rows: Tensor, how: ActivationQuantization, storage: torch.dtype) -> Tensor:
    """What rounding `rows [rows, K]` to storage before they are quantised moves each by: a step, or nothing.

    `leaning` says what that is worth where values are spread over midpoints. Where most lie at few of them (of numbers
    under a format's smallest normal one there is one midpoint below its least number), it is what these values make it.
    """
    if rows.numel() == 0:
        return torch.zeros_like(rows)
    scales = how.scales(rows)
    exact, twice = (nearest(values / scales, how.dtype) for values in (rows, rows.to(storage).to(rows.dtype)))
    return (twice - exact) * scales


@dataclass(frozen=True)
class Quantized:
    """What quantising adds around the rows that a GEMM reads.

    Attributes:
        flips: `[rows, K]`, in the units of the rows.
        scale_error: `[rows, K]`, relative error of each element's scale, common to all that share it.
    """

    flips: Flips
    scale_error: Tensor


def quantized(rows: Tensor, row_variance: Tensor, how: ActivationQuantization, rare: float = RARE) -> Quantized:
    """The budget of quantising rows `[rows, K]` whose values are known up to a variance `[rows, K]`."""
    if rows.numel() == 0:
        nothing = torch.zeros_like(rows)
        return Quantized(Flips(nothing, nothing, nothing), nothing)
    scales = how.scales(rows)
    scale_error = _scale_error(rows, row_variance, how)
    arithmetic = QUANTIZER_ROUNDOFFS * FLOAT32.unit_roundoff
    if how.static_scale is not None and math.frexp(how.static_scale)[0] == 0.5:
        arithmetic = 0.0  # over a power of two nothing is rounded
    scaled = rows / scales
    sigma = (row_variance / scales**2 + (scale_error**2 + arithmetic**2) * scaled**2).sqrt()
    on_grid = flips(scaled, sigma, how.dtype, rare)
    return Quantized(Flips(*(scales**2 * getattr(on_grid, f.name) for f in fields(Flips))), scale_error)


def _scale_error(rows: Tensor, variance: Tensor, how: ActivationQuantization) -> Tensor:
    if how.static_scale is not None:
        return torch.zeros_like(rows)

    def relative(magnitude: Tensor, sigma: Tensor, dims: tuple[int, ...]) -> Tensor:
        amax = magnitude.amax(dim=dims, keepdim=True)
        near = torch.where(magnitude + NEAR * sigma >= amax, sigma, 0.0).amax(dim=dims, keepdim=True)
        return torch.where(amax == 0, 0.0, near / amax + FLOAT32.unit_roundoff).expand_as(magnitude)

    magnitude, sigma = rows.abs(), variance.sqrt()
    if how.granularity == "tensor":
        return relative(magnitude, sigma, (0, 1))
    width = rows.shape[1] if how.granularity == "token" else how.group
    parts = zip(magnitude.split(width, dim=1), sigma.split(width, dim=1), strict=True)
    return torch.cat([relative(m, s, (1,)) for m, s in parts], dim=1)


def columns_of_a_scale(how: ActivationQuantization | None, columns: int) -> int:
    """How many columns of a row share one scale."""
    return how.group if how is not None and how.granularity == "group" else max(1, columns)


def is_shared_by_rows(how: ActivationQuantization | None) -> bool:
    """Whether all rows share one dynamic scale."""
    return how is not None and how.granularity == "tensor" and how.static_scale is None
