"""The gate measured with the gate: one tree against itself, plain and with slow-downs of a known size.

A run's file holds what pairs of processes measured; `trial` makes error rates of several files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..workloads import Workload
from .measuring import Measuring, Plan, Progress
from .process import ProcessError
from .sides import SideError, trees_as_sides
from .store import Store
from .table import is_good

SCHEMA = "moegate-gate-self-test/1"
LEVELS = (0.01, 0.02, 0.03, 0.05)


def run_self_test(
    tree: Path,
    workloads: Sequence[Workload],
    device: str,
    plan: Plan,
    cache: Path,
    *,
    levels: Sequence[float] = LEVELS,
    progress: Progress = lambda *_: None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a tree against itself until the plan's minutes are over; the data of `SCHEMA`.

    Args:
        tree: a checkout of moegate.
        workloads: the table.
        device: "cpu", "cuda" or "cuda:N".
        plan: as the gate's own; `pairs` is the most that are measured.
        cache: for what is carried, and unfinished runs.
        levels: slow-downs injected into every workload of the head beside its plain pass: 0.03 is 3 %.
        progress: told what is done.
        keep: given what there is after each pair, so that a run that is cut off leaves the pairs before.

    Raises:
        SideError: the tree cannot be measured.
    """
    for level in levels:
        if not 0 < level < 1:
            raise ValueError(f"levels: expected fractions above 0 and below 1, got {level}")
    started, clock = datetime.now(UTC), time.monotonic()
    sides = trees_as_sides(tree, tree, cache)
    store = Store(cache / "self-test", fresh=True)
    measuring = Measuring(sides, device, plan, store, levels=levels, progress=progress)
    deadline, last, number = clock + 60 * plan.minutes, 0.0, 0
    try:
        use = measuring.other_use()
        checks = measuring.check(workloads, ("head",))["head"]
        good = [workload for workload in workloads if checks[workload.id].get("holds")]
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "started": started.isoformat(timespec="seconds"),
            "seconds_of_check": round(time.monotonic() - clock, 1),
            "machine": measuring.machine,
            "other_use": use,
            "plan": asdict(plan),
            "levels": list(levels),
            "failed": {
                workload.id: str(checks[workload.id].get("error") or checks[workload.id].get("unsupported") or "wrong")
                for workload in workloads
                if workload not in good
            },
            "pairs": 0,
            "cells": {},
        }
        rotations = {workload.id: checks[workload.id] for workload in good}
        while good and number < plan.pairs and (number < 2 or time.monotonic() + last < deadline):
            began = time.monotonic()
            measuring.pair(number, good, rotations, more=number + 1 < plan.pairs)
            last, number = time.monotonic() - began, number + 1
            data |= {
                "pairs": number,
                "cells": {workload.id: store.cells(workload.id) for workload in good},
                "seconds": round(time.monotonic() - clock, 1),
                "seconds_of_pair": round(last, 1),
                "seconds_of_pairs": [*data.get("seconds_of_pairs", []), round(last, 1)],
            }
            keep(data)
    except ProcessError as error:
        raise SideError(str(error)) from error
    finally:
        measuring.close()
    store.finish()
    return data


def complete(data: dict[str, Any]) -> list[str]:
    """The workloads of a file that every pair has measured well."""
    return [
        name
        for name, cells in data["cells"].items()
        if len(cells) == data["pairs"] and all(is_good(cell) for cell in cells)
    ]
