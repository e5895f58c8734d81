"""Where a series of times changed for good: kernel segmentation by ruptures, each break confirmed by two tests.

Breaks are proposed by a kernel change-point search (Gaussian kernel, exact, penalised by the logarithm of the length;
Arlot, Celisse and Harchaoui 2019, as ruptures implements it) on log-times in units of their own noise, so that one
outlier is no break. One is kept if the smaller p-value of Student's and Mann and Whitney's test between its two
neighbouring segments, doubled for having looked twice, is small enough and the medians differ by enough; while one is
not, the weakest is dropped and its neighbours grow, as in Fleming et al. 2023, "Hunter".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..spread import robust_deviation

LEAST = 3
"""Points on either side of a change; fewer say nothing of whether it stays."""
MAX_P = 0.001
MIN_CHANGE = 0.01
_LEAST_NOISE = 1e-4
_KERNEL_WIDTH = 0.25


@dataclass(frozen=True)
class ChangePoint:
    """A change that stayed.

    Attributes:
        index: of the first point after it.
        before, after: the medians of the segments on its two sides, in seconds.
        change: after over before, minus one: 0.03 is 3 % slower.
        p_value: of no change, at most.
    """

    index: int
    before: float
    after: float
    change: float
    p_value: float


def find_changes(
    seconds: Sequence[float], *, max_p: float = MAX_P, min_change: float = MIN_CHANGE
) -> tuple[ChangePoint, ...]:
    """The changes of a series, in order.

    Args:
        seconds: times in the order of the commits.
        max_p: the largest p-value of one that counts.
        min_change: the least relative change that counts.

    Raises:
        ValueError: a time that is not finite and more than 0, or a limit out of its range.
    """
    if not 0 < max_p < 1:
        raise ValueError(f"max_p: expected a number in (0, 1), got {max_p}")
    if min_change < 0:
        raise ValueError(f"min_change: expected at least 0, got {min_change}")
    if any(not (value > 0 and math.isfinite(value)) for value in seconds):
        raise ValueError("seconds: expected finite times of more than 0 s")
    if len(seconds) < 2 * LEAST:
        return ()
    import numpy as np
    import ruptures

    logs = np.log(np.asarray(seconds, dtype=np.float64))
    steps = np.diff(logs)
    # The noise of one point from neighbours' differences, which a change touches once.
    noise = max(robust_deviation(steps.tolist()) / math.sqrt(2), _LEAST_NOISE)
    search = ruptures.KernelCPD(kernel="rbf", min_size=LEAST, params={"gamma": _KERNEL_WIDTH})
    breaks = search.fit((logs / noise)[:, None]).predict(pen=math.log(len(logs)))[:-1]
    while breaks:
        edges = [0, *breaks, len(logs)]
        found = [
            _between(logs[start:middle], logs[middle:end], middle)
            for (start, middle), (_, end) in pairwise(pairwise(edges))
        ]
        weakest = max(range(len(found)), key=lambda i: 1.0 if abs(found[i].change) < min_change else found[i].p_value)
        if found[weakest].p_value <= max_p and abs(found[weakest].change) >= min_change:
            return tuple(found)
        del breaks[weakest]
    return ()


def _between(left, right, index: int) -> ChangePoint:
    import numpy as np
    from scipy import stats

    with warnings.catch_warnings():
        # Times that are all equal on both sides: the medians decide.
        warnings.simplefilter("ignore", RuntimeWarning)
        student = float(stats.ttest_ind(left, right).pvalue)
    ranks = float(stats.mannwhitneyu(left, right).pvalue)
    before, after = math.exp(float(np.median(left))), math.exp(float(np.median(right)))
    p_value = min(1.0, 2 * min(ranks, 1.0 if math.isnan(student) else student))
    return ChangePoint(int(index), before, after, after / before - 1, p_value)
