"""One measurement as data: what was timed, how, on what, how fast, how fast it could be, and that it was right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .floor import Floor
from .machine import Clocks, Machine
from .rotation import Rotation
from .timer import PairedRatio, Timing

SCHEMA = "moegate-bench/1"


@dataclass(frozen=True)
class VerdictRecord:
    """The verdict on exactly what was timed.

    Attributes:
        holds: whether it is right; a record of a wrong kernel cannot be made.
        budget_used: its largest error over what is allowed.
        by: what judged it.
    """

    holds: bool
    budget_used: float
    by: str


@dataclass(frozen=True)
class Record:
    """One contender's measurement of one workload.

    Attributes:
        workload: the workload's id.
        model, num_tokens, routing, dtype: its parts, for tables and queries.
        subject: who was timed.
        timing: seconds of one call, every sample.
        method: "cuda-graph", "cuda-eager" or "host".
        method_note: why it is not a graph, else empty.
        floor: the least that the timed routings need.
        ceilings: what the floor was computed with (`Ceilings.as_dict`).
        cache_state: "cold" where `rotation` proves it; else "warm" where that was asked for, or "unproven".
        rotation: the calls timed in turn.
        machine: where.
        clocks_before, clocks_after: before the first sample, and when the last one was enqueued.
        path: what ran (`PathRecord.as_dict`): backend, assignment, configuration, launches of one call.
        verdict: of what was timed.
        versus: this subject's time over each other contender's, paired by round.
    """

    workload: str
    model: str
    num_tokens: int
    routing: str
    dtype: str
    subject: str
    timing: Timing
    method: str
    method_note: str
    floor: Floor
    ceilings: Mapping[str, Any]
    cache_state: str
    rotation: Rotation
    machine: Machine
    clocks_before: Clocks
    clocks_after: Clocks
    path: Mapping[str, Any]
    verdict: VerdictRecord
    versus: Mapping[str, PairedRatio] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.verdict.holds:
            raise ValueError(f"verdict: expected one that holds, got budget used {self.verdict.budget_used:.3g}")
        if self.cache_state == "cold" and not self.rotation.is_cold:
            raise ValueError(
                f"cache_state: expected {self.rotation.multiple * self.rotation.l2_bytes:.0f} bytes between two reads "
                f"of the same weights for cold, got {self.rotation.reuse_bytes}"
            )

    @property
    def ratio(self) -> float:
        """The median time over the floor."""
        return self.timing.median / self.floor.seconds

    @property
    def operations_per_second(self) -> float:
        """Operations that the work needs over the median time."""
        return self.floor.operations / self.timing.median

    @property
    def bytes_per_second(self) -> float:
        """Bytes that the work needs over the median time."""
        return self.floor.bytes / self.timing.median

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON holds: the fields, and what tables show without computing."""
        return {
            "schema": SCHEMA,
            **asdict(self),
            "seconds": self.timing.median,
            "spread": self.timing.spread,
            "ratio_to_floor": self.ratio,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Record:
        """The record that `as_dict`, and JSON after it, wrote.

        Raises:
            ValueError: another schema, or a field missing.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema: expected {SCHEMA}, got {data.get('schema')!r}")
        names = [f.name for f in fields(Record)]
        missing = [name for name in names if name not in data]
        if missing:
            raise ValueError(f"record: expected the fields {', '.join(names)}, got none of {', '.join(missing)}")
        parts = {
            "timing": Timing(tuple(data["timing"]["samples"])),
            "floor": Floor(**data["floor"]),
            "rotation": Rotation(**data["rotation"]),
            "machine": Machine(**data["machine"]),
            "clocks_before": Clocks(**data["clocks_before"]),
            "clocks_after": Clocks(**data["clocks_after"]),
            "verdict": VerdictRecord(**data["verdict"]),
            "versus": {name: PairedRatio(**ratio) for name, ratio in data["versus"].items()},
        }
        return Record(**{**{name: data[name] for name in names}, **parts})
