"""How much times vary where some of them were disturbed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# Of Gaussian values the standard deviation over the median absolute one.
_OF_GAUSSIAN = 1.4826


def robust_deviation(values: Sequence[float]) -> float:
    """The standard deviation of `values` by their median absolute deviation, as if the middle of them were Gaussian."""
    middle = statistics.median(values)
    return _OF_GAUSSIAN * statistics.median(abs(value - middle) for value in values)
