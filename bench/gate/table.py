"""The rows of a gate's table, from what the processes of both sides said and measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from ..workloads import Workload
from .record import Change, State, WorkloadRecord
from .verdict import Evidence, Judgement, pair_effect


def evidence_of(cells: Sequence[Mapping[str, Any]], first_look: int) -> Evidence | None:
    """What the cells of a workload say; None where fewer than two of the first look are good.

    Args:
        cells: in the order measured (`Store.cells`).
        first_look: how many pairs belong to the first look.
    """
    good = [(index, cell) for index, cell in enumerate(cells) if is_good(cell)]
    first = sum(index < first_look for index, _ in good)
    if first < 2:
        return None
    effects = tuple(pair_effect(cell["base"], cell["head"]) for _, cell in good)
    clocks: tuple[float, ...] = ()
    if all(cell["base_mhz"] and cell["head_mhz"] for _, cell in good):
        clocks = tuple(
            math.log(statistics.fmean(cell["head_mhz"]) / statistics.fmean(cell["base_mhz"])) for _, cell in good
        )
    return Evidence(effects, first, clocks)


def is_good(cell: Mapping[str, Any]) -> bool:
    """Whether a cell has times that count: it was measured, and the clock was not held back."""
    return "error" not in cell and "throttled" not in cell


def plain_row(
    workload: Workload, base: Mapping[str, Any], head: Mapping[str, Any], changes: Sequence[Change], *, is_known: bool
) -> WorkloadRecord:
    """A row before anything is timed.

    Args:
        workload: which.
        base: the base's answer (`Worker.check`, or an `error`).
        head: the head's.
        changes: between their paths.
        is_known: the base's own harness has this workload.
    """
    state, why = _state(base, head, is_known)
    return WorkloadRecord(
        workload=workload.id,
        model=workload.model.name,
        num_tokens=workload.num_tokens,
        routing=str(workload.routing),
        dtype=workload.stored,
        cache_state=_cache_state(workload, head),
        state=state,
        why=why,
        base_budget_used=base.get("budget_used"),
        head_budget_used=head.get("budget_used"),
        changes=tuple(changes),
        base_paths=base.get("paths", {}),
        head_paths=head.get("paths", {}),
    )


def _cache_state(workload: Workload, head: Mapping[str, Any]) -> str:
    if workload.cache_state != "cold":
        return workload.cache_state
    return "cold" if head.get("cold") else "unproven"


def _state(base: Mapping[str, Any], head: Mapping[str, Any], is_known: bool) -> tuple[State, str]:
    cannot = {name: side.get("unsupported") for name, side in (("base", base), ("head", head))}
    if cannot["base"] and cannot["head"]:
        return State.SKIPPED, str(cannot["head"])
    for name, side, state in (("head", head, State.WRONG), ("base", base, State.BASE_WRONG)):
        if not side.get("holds", True):
            return state, f"the {name} is wrong: it used {side['budget_used']:.3g} of its error budget"
    if "error" in head and "error" in base:
        return State.BASE_WRONG, f"both sides fail: {head['error']}"
    if "error" in head or cannot["head"]:
        return State.MISSING, f"the head cannot run it: {head.get('error') or cannot['head']}"
    if "error" in base or cannot["base"]:
        reason = base.get("error") or cannot["base"]
        if is_known:
            return State.BASE_WRONG, f"the base cannot run it, though its own harness has it: {reason}"
        return State.NEW, f"the base cannot run it: {reason}"
    return State.UNTIMED, "" if is_known else "new in the head's harness; the base runs it too"


def timed_row(
    row: WorkloadRecord, cells: Sequence[Mapping[str, Any]], judgement: Judgement | None, pairs: int
) -> WorkloadRecord:
    """The row with its times and verdict; with the reason where there are none."""
    good = [cell for cell in cells if is_good(cell)]
    if judgement is None:
        reasons = [
            str(cell.get("error") or f"the SM clock was held back: {cell['throttled']}")
            for cell in cells
            if not is_good(cell)
        ]
        return replace(row, why=reasons[-1] if reasons else "the time was used up")
    times = {name: statistics.median(second for cell in good for second in cell[name]) for name in ("base", "head")}
    clocks = {name: [mhz for cell in good for mhz in cell[f"{name}_mhz"]] for name in ("base", "head")}
    return replace(
        row,
        state=State.TIMED,
        verdict=judgement.verdict,
        why="; ".join(text for text in (judgement.why, row.why) if text),
        base_seconds=times["base"],
        head_seconds=times["head"],
        change=judgement.change,
        low=judgement.low,
        high=judgement.high,
        p_value=judgement.p_value,
        adjusted=judgement.adjusted,
        threshold=judgement.threshold,
        can_see=judgement.can_see,
        effects=tuple(pair_effect(cell["base"], cell["head"]) for cell in good),
        looks=2 if len(cells) > pairs else 1,
        base_mhz=statistics.median(clocks["base"]) if clocks["base"] else None,
        head_mhz=statistics.median(clocks["head"]) if clocks["head"] else None,
        method=str(good[0]["method"]),
    )


def renamed(own: Collection[str], workloads: Sequence[Workload], accepted: Sequence[str]) -> dict[str, WorkloadRecord]:
    """Rows of the workloads that the base's own harness has and the head's has not: gone, or under another name.

    An id without the model's name is the shape, the dtype and the routing: where the head has the same under another
    name, it was renamed.
    """
    ours = {workload.id: workload for workload in workloads}
    by_shape = {name.removeprefix(w.model.name): name for name, w in ours.items() if name not in own}
    rows = {}
    for name in sorted(set(own) - set(ours)):
        new = next((by_shape[shape] for shape in by_shape if name.endswith(shape)), "")
        state = State.RENAMED if new else State.MISSING
        why = f"now {new}" if new else "the head's harness no longer has it"
        if not new and any(fnmatchcase(f"missing:{name}", p) or fnmatchcase("missing", p) for p in accepted):
            why += " (accepted)"
        rows[name] = WorkloadRecord(name, "", 0, "", "", "", state, why=why, renamed_to=new)
    return rows
