"""What the history answers: runs, series over commits, and two runs side by side.

Two times are of one series only where the GPU's model, the workload (and so the routing distribution and its hash),
the cache's state, the subject and the clock's method are all the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .run import outcome_of


@dataclass(frozen=True)
class Filter:
    """Which points are meant; None: any.

    Attributes:
        device: the GPU's model, or a part of its name.
        model, num_tokens, dtype, subject: as recorded.
        routing: the distribution, with or without its seed: `zipf1.2` is every seed of it.
    """

    device: str | None = None
    model: str | None = None
    num_tokens: int | None = None
    routing: str | None = None
    dtype: str | None = None
    subject: str | None = None

    def where(self) -> tuple[str, list[Any]]:
        """An SQL condition over `points`, and its values."""
        clauses, values = ["1"], []
        for name in ("model", "num_tokens", "dtype", "subject"):
            if getattr(self, name) is not None:
                clauses.append(f"points.{name} = ?")
                values.append(getattr(self, name))
        if self.device is not None:
            clauses.append("instr(lower(points.device), lower(?)) > 0")
            values.append(self.device)
        if self.routing is not None:
            clauses.append("(points.routing = ? OR points.routing LIKE ? || '-s%')")
            values += [self.routing, self.routing]
        return " AND ".join(clauses), values


@dataclass(frozen=True)
class Listed:
    """A run in a list: `Run`'s facts without its points."""

    id: str
    time: str
    commit: str
    commit_time: str
    branch: str
    dirty: bool
    exit_code: int | None
    device: str
    driver: str
    torch: str
    triton: str
    origin: str
    path: str
    promoted: bool
    points: int
    failures: int

    @property
    def outcome(self) -> str:
        """How it ended: "passed", "failed" or "unknown"."""
        return outcome_of(self.exit_code)

    @property
    def counts(self) -> bool:
        """Whether its times may be drawn and compared with others': it passed, and its commit is what ran."""
        return self.exit_code == 0 and not self.dirty


@dataclass(frozen=True)
class SeriesKey:
    """What all points of a series share; two that differ in any of these are never mixed."""

    device: str
    workload: str
    cache_state: str
    subject: str
    method: str
    model: str
    num_tokens: int
    routing: str
    dtype: str


@dataclass(frozen=True)
class SeriesPoint:
    """One commit of a series.

    Attributes:
        run: the newest of its runs.
        time: of that run.
        commit, commit_time: the commit.
        seconds: the median over its runs' medians.
        low, high: the lowest first and the highest third quartile of its runs.
        runs: how many runs it has.
        floor_seconds, sm_mhz, path, driver, torch, triton: of the newest run.
    """

    run: str
    time: str
    commit: str
    commit_time: str
    seconds: float
    low: float
    high: float
    runs: int
    floor_seconds: float
    sm_mhz: float | None
    path: str
    driver: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Series:
    """Times of one workload on one GPU model, a point for each commit in the order of the commits' times."""

    key: SeriesKey
    points: tuple[SeriesPoint, ...]


@dataclass(frozen=True)
class Compared:
    """One series in two runs; a change of 0.03 is 3 % slower."""

    key: SeriesKey
    before: float
    after: float

    @property
    def change(self) -> float:
        """After over before, minus one."""
        return self.after / self.before - 1


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        rows: what both have.
        unmatched: (workload, subject, which side has it, why it was not compared).
    """

    before: Listed
    after: Listed
    rows: tuple[Compared, ...]
    unmatched: tuple[tuple[str, str, str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        names = ("workload", "subject", "run", "why")
        return {
            "before": asdict(self.before),
            "after": asdict(self.after),
            "rows": [{**asdict(row), "change": row.change} for row in self.rows],
            "unmatched": [dict(zip(names, row, strict=True)) for row in self.unmatched],
        }


class UnknownRunError(ValueError):
    """No run, or several, where one was named."""
