"""Change points of stored series: between which commits, and what else changed there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .answers import Series, SeriesKey, SeriesPoint
from .change_points import LEAST, MAX_P, MIN_CHANGE, ChangePoint, find_changes

_BESIDE = ("driver", "torch", "triton", "path")


@dataclass(frozen=True)
class SeriesChange:
    """A change of one series.

    Attributes:
        key: of the series.
        last, first: the points before and after it: it came with a commit after `last`'s, up to `first`'s.
        point: how large, and how sure.
        commits_since: points after it.
    """

    key: SeriesKey
    last: SeriesPoint
    first: SeriesPoint
    point: ChangePoint
    commits_since: int

    @property
    def also_changed(self) -> list[str]:
        """What of machine and path changed there too, which may be the cause instead of a commit."""
        return [
            f"{name} {getattr(self.last, name) or '-'} -> {getattr(self.first, name) or '-'}"
            for name in _BESIDE
            if getattr(self.last, name) != getattr(self.first, name)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "key": asdict(self.key),
            "last_commit": self.last.commit,
            "first_commit": self.first.commit,
            "time": self.first.commit_time or self.first.time,
            "before": self.point.before,
            "after": self.point.after,
            "change": self.point.change,
            "p_value": self.point.p_value,
            "commits_since": self.commits_since,
            "also_changed": self.also_changed,
        }


def is_searchable(series: Series) -> bool:
    """Whether it has enough commits for a change on either side."""
    return len(series.points) >= 2 * LEAST


def changes_of(
    series: Iterable[Series], *, max_p: float = MAX_P, min_change: float = MIN_CHANGE
) -> Iterator[SeriesChange]:
    """The changes of each series, in order; arguments and errors as `find_changes`."""
    for one in series:
        for found in find_changes([point.seconds for point in one.points], max_p=max_p, min_change=min_change):
            last, first = one.points[found.index - 1], one.points[found.index]
            yield SeriesChange(one.key, last, first, found, len(one.points) - found.index)
