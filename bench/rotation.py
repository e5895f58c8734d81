"""Keeping the cache cold: how many weight copies and routings are timed in turn, and the proof that it is enough.

A call's weights are cold if, since the same bytes were last read, at least `multiple` times the L2's size of other
bytes went through it. That reuse distance is computed from the routings themselves and kept in every record. A
workload whose rotation cannot reach it is measured all the same, and never called cold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .floor import expert_bytes
from .workloads import Workload


@dataclass(frozen=True)
class Rotation:
    """The calls that are timed one after the other, again and again.

    Attributes:
        calls: how many; call i uses routing i and weight copy i modulo `weight_copies`.
        weight_copies: separate copies of all weights.
        bytes_rotated: distinct weight bytes that one round of all calls touches.
        reuse_bytes: the least number of distinct bytes read between two reads of the same weights.
        l2_bytes: the size of the device's last-level cache; 0 where it is not known.
        multiple: how many times `l2_bytes` must lie between two reads of the same weights.
    """

    calls: int
    weight_copies: int
    bytes_rotated: int
    reuse_bytes: int
    l2_bytes: int
    multiple: float

    @property
    def is_cold(self) -> bool:
        """Whether every weight that a call reads had to leave the cache before."""
        return self.l2_bytes > 0 and self.reuse_bytes >= self.multiple * self.l2_bytes

    def copy_of(self, call: int) -> int:
        """The weight copy that a call uses."""
        return call % self.weight_copies


def calls_to_average(num_tokens: int) -> int:
    """How many routings are timed in turn: many where few tokens make the number of experts touched a matter of luck.

    Few where a call is long, since there they are all alike and only cost memory.
    """
    for up_to, calls in ((16, 16), (256, 8), (2048, 4)):
        if num_tokens <= up_to:
            return calls
    return 2


def plan_rotation(
    workload: Workload, l2_bytes: int, *, multiple: float = 2.0, max_copies: int = 16, min_calls: int | None = None
) -> Rotation:
    """The fewest weight copies that keep a workload cold, or the best of `max_copies` that do not.

    Args:
        workload: what is timed; one that is not meant to be cold gets one copy.
        l2_bytes: size of the last-level cache in bytes, 0 where it is not known.
        multiple: times `l2_bytes` between two reads of the same weights.
        max_copies: copies that fit in memory.
        min_calls: routings to time in turn; None: `calls_to_average(M)`.

    Raises:
        ValueError: a size out of its range.
    """
    if l2_bytes < 0:
        raise ValueError(f"l2_bytes: expected at least 0, got {l2_bytes}")
    if max_copies < 1:
        raise ValueError(f"max_copies: expected at least 1, got {max_copies}")
    if multiple <= 0:
        raise ValueError(f"multiple: expected more than 0, got {multiple}")
    least = calls_to_average(workload.num_tokens) if min_calls is None else min_calls
    if least < 1:
        raise ValueError(f"min_calls: expected at least 1, got {least}")
    best: Rotation | None = None
    for copies in range(1, max_copies + 1):
        # A multiple of the copies: else the last call and the first one of the next round would share a copy.
        calls = -(-least // copies) * copies
        touched = [workload.rows_by_local_expert(call) > 0 for call in range(calls)]
        plan = _measure(workload, touched, copies, l2_bytes, multiple)
        if plan.is_cold or workload.cache_state != "cold" or l2_bytes == 0:
            return plan
        if best is None or plan.reuse_bytes > best.reuse_bytes:
            best = plan
    if best is None:
        raise RuntimeError("no rotation was planned")
    return best


def _measure(workload: Workload, touched: list[np.ndarray], copies: int, l2_bytes: int, multiple: float) -> Rotation:
    model = workload.model
    per_expert = expert_bytes(workload)
    w2_bytes = per_expert * model.intermediate_size // (model.w13_rows + model.intermediate_size)
    return rotation_of(
        touched, copies, w13_bytes=per_expert - w2_bytes, w2_bytes=w2_bytes, l2_bytes=l2_bytes, multiple=multiple
    )


def rotation_of(
    touched: Sequence[np.ndarray], copies: int, *, w13_bytes: int, w2_bytes: int, l2_bytes: int, multiple: float = 2.0
) -> Rotation:
    """The rotation of calls that touch these experts, with its reuse distance.

    Args:
        touched: of each call, `[E_local]` bool.
        copies: call i reads weight copy i modulo this.
        w13_bytes: of one expert.
        w2_bytes: of one expert.
        l2_bytes: size of the last-level cache in bytes, 0 where it is not known.
        multiple: times `l2_bytes` between two reads of the same weights.
    """
    calls, per_expert = len(touched), w13_bytes + w2_bytes
    items = np.zeros((calls, copies, len(touched[0])), dtype=bool)
    for call, experts in enumerate(touched):
        items[call, call % copies] = experts
    least: int | None = None
    for first in range(calls):
        waiting = items[first].copy()
        between = np.zeros_like(waiting)
        for step in range(1, calls + 1):
            again = items[(first + step) % calls]
            if (waiting & again).any():
                # A layer runs GEMM1 and then GEMM2. So after w13[e] all of this call's w2 is still to come, and before
                # w2[e] is read again all of the next call's w13 is.
                own = min(int(items[first].sum()) * w2_bytes, int(again.sum()) * w13_bytes)
                distance = int(between.sum()) * per_expert + own
                least = distance if least is None else min(least, distance)
                waiting &= ~again
            if not waiting.any():
                break
            between |= again
    return Rotation(
        calls=calls,
        weight_copies=copies,
        bytes_rotated=int(items.any(axis=0).sum()) * per_expert,
        reuse_bytes=least or 0,
        l2_bytes=l2_bytes,
        multiple=multiple,
    )
