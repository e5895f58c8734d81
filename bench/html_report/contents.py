"""What the report shows, gathered as plain data: series with their changes, gates, conformance, faults, decisions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..history.answers import Series
from ..history.changes import SeriesChange, changes_of, is_searchable
from ..history.queries import History
from ..history.store import GATE_SCHEMA
from .decisions import Cell

NEWEST = 1000
"""Runs of each GPU model that are looked at, the newest."""
MOST_POINTS = 400
"""Commits of one series that are drawn, the newest; changes are searched over all that are looked at."""
MOST_GATES = 5


_BUDGET = ("budget_used", "budget_used_median")


class UnreadableError(ValueError):
    """A file handed to the report that is not what its option says."""


@dataclass(frozen=True)
class Contents:
    """Everything on the page.

    Attributes:
        version: moegate's.
        written: when, ISO 8601 in UTC.
        is_promoted: whether the series hold promoted runs alone.
        series: for the page's script and the table, the most recently changed first.
        changes: every change point, newest first.
        gates: gates' records (`GateRecord.as_dict`), newest first.
        checks: conformance reports (`moegate check --json`).
        faults: reports of planted faults (`moegate faults --json`), with `columns`, the properties that killed
            any, and their `totals`: (kills, kills that no other property has).
        decisions: by layer and platform.
        aside: (file, reason) of what is in the store and not in the report.
    """

    version: str
    written: str
    is_promoted: bool
    series: tuple[dict[str, Any], ...]
    changes: tuple[dict[str, Any], ...]
    gates: tuple[Mapping[str, Any], ...]
    checks: tuple[Mapping[str, Any], ...]
    faults: tuple[Mapping[str, Any], ...]
    decisions: Mapping[str, Mapping[str, Cell]]
    aside: tuple[tuple[str, str], ...] = ()


def gather(
    history: History | None,
    *,
    version: str,
    decisions: Mapping[str, Mapping[str, Cell]],
    promoted: bool = True,
    gates: Sequence[Mapping[str, Any]] = (),
    checks: Sequence[Mapping[str, Any]] = (),
    faults: Sequence[Mapping[str, Any]] = (),
) -> Contents:
    """Gather a report.

    Args:
        history: an open history; None: no trends.
        version: moegate's.
        decisions: `decision_table()`.
        promoted: draw promoted runs alone, else every clean run that passed.
        gates: records beside those in the history's store.
        checks: conformance reports.
        faults: reports of planted faults.

    Raises:
        UnreadableError: one of the reports is none, by its option's name.
    """
    series = [] if history is None else history.series(promoted=promoted, newest=NEWEST)
    changes = list(changes_of(one for one in series if is_searchable(one)))
    stored = [] if history is None else history.gates(MOST_GATES)
    every_gate = sorted((_gate(one) for one in (*gates, *stored)), key=lambda one: str(one["started"]), reverse=True)
    distinct = list({json.dumps(one, sort_keys=True): one for one in every_gate}.values())
    return Contents(
        version=version,
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        is_promoted=promoted,
        series=tuple(_series(number, one, changes) for number, one in enumerate(series)),
        changes=tuple(sorted((change.as_dict() for change in changes), key=lambda row: row["time"], reverse=True)),
        gates=tuple(distinct[:MOST_GATES]),
        checks=tuple(_check(one) for one in checks),
        faults=tuple(_faults(one) for one in faults),
        decisions=decisions,
        aside=() if history is None else tuple((each.path, each.reason) for each in history.aside()),
    )


def _series(number: int, series: Series, changes: Sequence[SeriesChange]) -> dict[str, Any]:
    key, points = series.key, series.points
    first = max(0, len(points) - MOST_POINTS)
    mine = [change for change in changes if change.key == key]
    last = points[-1]
    return {
        "id": number,
        "device": key.device,
        "model": key.model,
        "num_tokens": key.num_tokens,
        "routing": key.routing,
        "dtype": key.dtype,
        "subject": key.subject,
        "cache": f"{key.cache_state}, {key.method}",
        "workload": key.workload,
        "seconds": last.seconds,
        "floor_seconds": last.floor_seconds,
        "ratio": last.seconds / last.floor_seconds,
        "commits": len(points),
        "left_out": first,
        "commit": last.commit,
        "time": last.commit_time or last.time,
        "path": last.path,
        "points": [
            {
                "commit": point.commit,
                "time": point.commit_time or point.time,
                "us": point.seconds * 1e6,
                "low": point.low * 1e6,
                "high": point.high * 1e6,
                "floor": point.floor_seconds * 1e6,
                "runs": point.runs,
                "mhz": point.sm_mhz,
                "driver": point.driver,
                "path": point.path,
            }
            for point in points[first:]
        ],
        "changes": [
            {"index": change.point.index - first, "change": change.point.change, "p": change.point.p_value}
            for change in mine
            if change.point.index > first
        ],
        "last_change": mine[-1].as_dict() if mine else None,
    }


def _gate(record: Mapping[str, Any]) -> Mapping[str, Any]:
    if record.get("schema") != GATE_SCHEMA:
        raise UnreadableError(f"gate: expected schema {GATE_SCHEMA}, got {record.get('schema')!r}")
    needed = (
        "verdict",
        "why",
        "base",
        "head",
        "device",
        "started",
        "clock",
        "can_see",
        "workloads",
        "changes",
        "notes",
    )
    return _with(record, needed, "gate")


def _check(report: Mapping[str, Any]) -> Mapping[str, Any]:
    needed = ("verdict", "subject", "device", "profile", "executions", "properties", "feature_pairs", "not_judged")
    known = {"stale": [], "known_failures": [], **_with(report, needed, "check")}
    rows = []
    for row in known["properties"]:
        row = _with(row, ("id", "sentence", "cases", "budget_used", "verdict", "finding"), "check")
        # Infinity comes as a word, since JSON has none.
        used, median = (None if row.get(name) is None else float(row[name]) for name in _BUDGET)
        rows.append({"replay": None, **row, "budget_used": used, "budget_used_median": median})
    return {**known, "properties": rows}


def _faults(report: Mapping[str, Any]) -> Mapping[str, Any]:
    rows = []
    for fault in _with(report, ("score", "faults"), "faults")["faults"]:
        row = dict(_with(fault, ("id", "area", "killed", "by", "cases"), "faults"))
        by = [row["by"]] if isinstance(row["by"], str) else list(row["by"] or [])
        # A matrix says of every property in how many of its cases it saw the fault; a hunt stops at the first kill.
        counts = row.get("kills") or {}
        row["cells"] = {str(name): "" for name in by} | {
            str(name): f"in {kills} of {cases} cases" for name, (kills, cases) in counts.items() if kills
        }
        rows.append(row)
    columns = sorted({name for row in rows for name in row["cells"]})
    seen = {name: [row for row in rows if name in row["cells"]] for name in columns}
    totals = {name: (len(found), sum(len(row["cells"]) == 1 for row in found)) for name, found in seen.items()}
    return {"not_hunted": [], **report, "faults": rows, "columns": columns, "totals": totals}


def _with(data: Any, needed: Sequence[str], option: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise UnreadableError(f"{option}: expected an object, got {type(data).__name__}")
    missing = [name for name in needed if name not in data]
    if missing:
        raise UnreadableError(f"{option}: expected {', '.join(needed)}, got none of {', '.join(missing)}")
    return data
