"""What a gate run found, as data: the schema `moegate-gate/1` that the command writes and that history and report read.

Times are in seconds of one call. Changes are fractions of the base's time: 0.03 is 3 % slower, -0.02 is 2 % faster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from ...impl.whole_file import write_whole

SCHEMA = "moegate-gate/1"


class Verdict(StrEnum):
    """What is said of one workload's time."""

    SLOWER = "SLOWER"
    FASTER = "FASTER"
    SAME = "SAME"
    UNCLEAR = "UNCLEAR"


class State(StrEnum):
    """Whether a workload has a time on both sides."""

    TIMED = "timed"
    UNTIMED = "untimed"  # both sides are right; the clock was off, or the time was used up
    NEW = "new"  # the base cannot run it
    MISSING = "missing"  # the head can no longer run it
    RENAMED = "renamed"  # the head has it under another id; `renamed_to` says which
    WRONG = "wrong"  # the head computes something else
    BASE_WRONG = "base_wrong"  # the base does, or fails where its own harness has the workload: nothing to compare with
    SKIPPED = "skipped"  # neither side can run it


@dataclass(frozen=True)
class Change:
    """Something that differs between base and head and that needs no clock.

    Attributes:
        what: `launches`, `backend`, `assignment`, `config`, `shared_experts_order`, `bytes`, `registers`, `spills`,
            `decision`, ...
        where: the workload's id, the kernel's name, or the question that was decided.
        base: the base's value.
        head: the head's value.
        fails: whether it counts as a finding where no clock judged it: a path, a launch more, a spill.
        accepted: the run was told to take it (`--accept`).
    """

    what: str
    where: str
    base: Any
    head: Any
    fails: bool
    accepted: bool = False


@dataclass(frozen=True)
class SideRecord:
    """One of the two sides.

    Attributes:
        revision: as it was asked for, "working tree" for a checkout as it stands.
        commit: the full commit id; "" outside of git.
        dirty: whether files differ from that commit.
        commit_time: ISO 8601 with its offset; "" outside of git.
        subject: what was timed: "moegate", or FILE.py:CLASS.
    """

    revision: str
    commit: str
    dirty: bool
    commit_time: str
    subject: str


@dataclass(frozen=True)
class WorkloadRecord:
    """One row of the table.

    Attributes:
        workload: the id (`Workload.id`).
        model, num_tokens, routing, dtype, cache_state: its parts, for tables and queries.
        state: whether it was timed.
        verdict: where it was timed, else None.
        why: what the verdict or state rests on, in words.
        base_seconds, head_seconds: medians over all samples; None where not timed.
        change: head over base, minus one, by the pairs' paired ratios.
        low, high: its interval, at the table's controlled level.
        p_value: of no change at all, two-sided; `adjusted` controls the table's false discoveries.
        threshold: the least change that counts.
        can_see: the least change that is flagged in 80 % of runs here.
        effects: of each pair of processes, log(head / base).
        looks: how often it was measured (1, or more for suspects and what was unclear).
        base_mhz, head_mhz: the median SM clock while it ran; None where it cannot be read.
        base_budget_used, head_budget_used: of the error budget, by the judge that ran before any timing.
        method: "cuda-graph", "cuda-eager" or "host".
        changes: launches, path, bytes: what differs without a clock.
        renamed_to: the head's id of it.
        base_paths, head_paths: what ran on each side (`PathRecord.as_dict`, one call).
    """

    workload: str
    model: str
    num_tokens: int
    routing: str
    dtype: str
    cache_state: str
    state: State
    verdict: Verdict | None = None
    why: str = ""
    base_seconds: float | None = None
    head_seconds: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    adjusted: float | None = None
    threshold: float | None = None
    can_see: float | None = None
    effects: tuple[float, ...] = ()
    looks: int = 0
    base_mhz: float | None = None
    head_mhz: float | None = None
    base_budget_used: float | None = None
    head_budget_used: float | None = None
    method: str = ""
    changes: tuple[Change, ...] = ()
    renamed_to: str = ""
    base_paths: Mapping[str, Any] = field(default_factory=dict)
    head_paths: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GateRecord:
    """One gate run.

    Attributes:
        verdict: "holds", "regression", "inconclusive" or "nothing".
        exit_code: 0 holds, 1 a regression or a finding, 2 inconclusive, 3 nothing measured, 4 bad arguments.
        why: one line for each reason of that.
        base, head: the two sides.
        device: what they were measured on, "cpu" or the GPU's name.
        machine: `Machine` as data, with driver and versions.
        started: ISO 8601 in UTC.
        seconds: how long the run took.
        clock: whether times were measured at all.
        can_see: the median of the workloads' `can_see`; None without times.
        plan: how it was measured (`Plan` as data).
        workloads: a row for each.
        changes: what differs without a clock and belongs to no workload: decisions for other platforms, kernels'
            registers and spills.
        notes: what a reader should know: a resumed run, a clock that was throttled, a harness that was carried.
    """

    verdict: str
    exit_code: int
    why: tuple[str, ...]
    base: SideRecord
    head: SideRecord
    device: str
    machine: Mapping[str, Any]
    started: str
    seconds: float
    clock: bool
    can_see: float | None
    plan: Mapping[str, Any]
    workloads: tuple[WorkloadRecord, ...]
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON holds."""
        return {"schema": SCHEMA, **asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> GateRecord:
        """The record that `as_dict`, and JSON after it, wrote.

        Raises:
            ValueError: another schema, or a field missing.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema: expected {SCHEMA}, got {data.get('schema')!r}")
        whole = _known(GateRecord, data)
        workloads = []
        for row in whole["workloads"]:
            parts = _known(WorkloadRecord, row)
            parts["state"] = State(parts["state"])
            parts["verdict"] = None if parts["verdict"] is None else Verdict(parts["verdict"])
            parts["effects"] = tuple(parts["effects"])
            parts["changes"] = tuple(Change(**_known(Change, change)) for change in parts["changes"])
            workloads.append(WorkloadRecord(**parts))
        whole |= {
            "base": SideRecord(**_known(SideRecord, whole["base"])),
            "head": SideRecord(**_known(SideRecord, whole["head"])),
            "workloads": tuple(workloads),
            "changes": tuple(Change(**_known(Change, change)) for change in whole["changes"]),
            "why": tuple(whole["why"]),
            "notes": tuple(whole["notes"]),
        }
        return GateRecord(**whole)


def _known(of: type, data: Any) -> dict[str, Any]:
    """The fields of a dataclass from data; others are left for later versions to say."""
    names = [f.name for f in fields(of)]
    missing = [name for name in names if not isinstance(data, Mapping) or name not in data]
    if missing:
        raise ValueError(f"{of.__name__}: expected the fields {', '.join(names)}, got none of {', '.join(missing)}")
    return {name: data[name] for name in names}


def write_json(path: Path, data: Any) -> None:
    """Write a file whole or not at all: readers and interrupted writers never leave half of one."""
    write_whole(path, json.dumps(data, indent=1) + "\n", make_folders=True)
