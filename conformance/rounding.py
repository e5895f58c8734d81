"""What one rounding and one sum of rounded products may cost: the pieces that the error budget is made of.

Sources: Higham, *Accuracy and Stability of Numerical Algorithms*, ch. 3; Higham and Mary 2019 (SIAM J. Sci. Comput.
41(5), probabilistic rounding error analysis).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .numerics import FLOAT32, HOPPER_FP8_STEP, HOPPER_FP8_UNIT_ROUNDOFF, Format, Numerics


def rounding(values: Tensor, to: Format) -> Tensor:
    """Squared largest error of rounding `values` to a format."""
    return (to.unit_roundoff * values.abs() + to.half_smallest_subnormal) ** 2


def floor(values: Tensor, to: Format) -> Tensor:
    """Largest error of rounding values below the smallest normal, 0 elsewhere.

    There the error follows the value (all of it, where it becomes zero), so along a row it adds up instead of
    averaging out: the gains take it linearly.
    """
    return torch.where((values != 0) & (values.abs() < to.smallest_normal), to.half_smallest_subnormal, 0.0)


def beside_bias(values: Tensor, dot: Tensor, to: Format) -> Tensor:
    """Largest error of rounding dot + bias where the dot moves the bias by less than a step, 0 elsewhere.

    There the rounding is the bias's own, and biases that all lie a little beyond a format's grid lose one way.

    Args:
        values: dot + bias.
        dot: shape as values.
        to: the format.
    """
    largest = to.unit_roundoff * values.abs()
    mantissa, exponent = torch.frexp(values)
    rounded = torch.ldexp((mantissa / to.unit_roundoff).round() * to.unit_roundoff, exponent)
    own = torch.minimum((rounded - values).abs() + dot.abs(), largest)
    return torch.where(dot.abs() <= 2 * largest, own, 0.0)


def accumulation(num_terms: int, total: Tensor, squares: Tensor, unit_roundoff: float) -> Tensor:
    """Squared error of summing `num_terms` products in an accumulator, in an order that nobody promised.

    Over random orders the i-th partial sum s_i has E[s_i^2] = i(K-i)/(K(K-1)) Q + i(i-1)/(K(K-1)) S^2, with S the sum
    and Q the sum of squares; each addition from the second on rounds its partial sum, and each product may be rounded.

    Args:
        num_terms: K.
        total: S, the exact sum.
        squares: Q, the sum of the squared terms.
        unit_roundoff: of the running sum.
    """
    if num_terms < 2:
        return unit_roundoff**2 * squares
    i = torch.arange(2, num_terms + 1, dtype=torch.float64)
    pairs = num_terms * (num_terms - 1)
    on_squares = float((i * (num_terms - i)).sum() / pairs)
    on_total = float((i * (i - 1)).sum() / pairs)
    return unit_roundoff**2 * ((1 + on_squares) * squares + on_total * total**2)


@dataclass(frozen=True)
class Accumulator:
    """How a GEMM sums its products.

    Attributes:
        is_exact: integer products in an integer accumulator.
        window: products that are summed in few bits before they enter a float32 sum; 0 where float32 takes all.
        scalings: float32 products with scales, of partial sums or of the whole.
    """

    is_exact: bool = False
    window: int = 0
    scalings: int = 0

    @staticmethod
    def of(numerics: Numerics, activations: torch.dtype | None, num_terms: int, *, is_scaled: bool) -> Accumulator:
        """That of a GEMM over `num_terms` products.

        Args:
            numerics: declared.
            activations: the few-bit dtype of its input, or None.
            num_terms: K.
            is_scaled: whether its weights have scales.
        """
        short = numerics.accumulator == "hopper_fp8" and activations == torch.float8_e4m3fn
        window = min(numerics.promoted_every or num_terms, num_terms) if short else 0
        return Accumulator(activations == torch.int8, window, 2 * (activations is not None) + is_scaled)

    def variance(self, num_terms: int, total: Tensor, squares: Tensor) -> Tensor:
        """Squared error of a sum, as `accumulation` says it, with what the scales' products round."""
        scaled = (self.scalings * FLOAT32.unit_roundoff) ** 2 * (squares + total**2)
        if self.is_exact:
            return (FLOAT32.unit_roundoff * total) ** 2 + scaled
        summed = accumulation(num_terms, total, squares, FLOAT32.unit_roundoff)
        if self.window:
            # A window's share of the sum: its part of the total, and what chance adds to that.
            windows = -(-num_terms // self.window)
            share = ((total / windows) ** 2 + squares / windows).sqrt()
            summed = summed + windows * accumulation(self.window, share, squares / windows, HOPPER_FP8_UNIT_ROUNDOFF)
        return summed + scaled

    def drift(self, total: Tensor) -> Tensor:
        """What short sums may lose in one direction (they truncate), so that it adds up along a row.

        A window of n steps cuts n partial sums, which grow evenly to the window's: 1/n, 2/n, ... of it, in all
        (n + 1) / 2 times what the last one alone loses at most.
        """
        if not self.window:
            return torch.zeros_like(total)
        steps = -(-self.window // HOPPER_FP8_STEP)
        return HOPPER_FP8_UNIT_ROUNDOFF * (steps + 1) / 2 * total.abs()
