"""A gate run from its sides to its record: verify, compare what needs no clock, time, judge, time again, decide."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase

from ..workloads import Workload
from .guards import Described, accept, compare, compare_kernels, compare_paths
from .measuring import SIDES, Measuring, Plan, Progress
from .outcome import Outcome, decide
from .process import ProcessError
from .record import Change, GateRecord, State, WorkloadRecord
from .sides import MOEGATE, SideError, Sides, own_site
from .store import Store
from .table import evidence_of, plain_row, renamed, timed_row
from .verdict import Judgement, Rule, is_open, judge, refused_threshold, table_can_see

_COMPILED_ON_CPU = 24
_OWN_SECONDS = 120
# Of the time: what suspects need to be measured again.
_RESERVED = 0.3


@dataclass(frozen=True)
class Thresholds:
    """The least change that counts.

    Attributes:
        default: of every workload; None: 1 %, or what can be seen here where that is more.
        by_pattern: of the workloads whose id matches, the last pattern first.

    Raises:
        ValueError: no fraction between 0 and 1.
    """

    default: float | None = None
    by_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in (self.default, *self.by_pattern.values()):
            if value is not None:
                Rule(threshold=value)

    def rule(self, workload: str, looks: int) -> Rule:
        """Of one workload."""
        for pattern, value in reversed(list(self.by_pattern.items())):
            if fnmatchcase(workload, pattern):
                return Rule(threshold=value, strict=True, looks=looks)
        if self.default is None:
            return Rule(looks=looks)
        return Rule(threshold=self.default, strict=True, looks=looks)


@dataclass(frozen=True)
class Request:
    """What is asked of a run.

    Attributes:
        workloads: the head's.
        device: "cpu", "cuda" or "cuda:N".
        plan: how to measure.
        thresholds: what counts.
        clock: whether anything is timed.
        accept: changes that are meant (`guards.accept`).
        allow_busy: measure though something else uses the GPU.
        fresh: forget an unfinished run of the same sides.
        selection: the words by which the workloads were chosen, for the base's own list.
    """

    workloads: Sequence[Workload]
    device: str
    plan: Plan = field(default_factory=Plan)
    thresholds: Thresholds = field(default_factory=Thresholds)
    clock: bool = True
    accept: tuple[str, ...] = ()
    allow_busy: bool = False
    fresh: bool = False
    selection: Mapping[str, str | None] = field(default_factory=dict)


def run_gate(sides: Sides, request: Request, progress: Progress = lambda *_: None) -> GateRecord:
    """Compare two sides.

    Raises:
        SideError: a side cannot be measured at all.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    plan = request.plan
    key = sides.key(
        json.dumps([asdict(plan), request.device, request.clock]), *(workload.id for workload in request.workloads)
    )
    store = Store(sides.cache / "runs" / key, fresh=request.fresh)
    notes = [f"{store.resumed} measurements of an interrupted run were kept"] if store.resumed else []
    notes += [f"a damaged file was set aside: {path}" for path in store.set_aside]
    measuring = Measuring(sides, request.device, plan, store, progress=progress)
    try:
        use = measuring.other_use() if request.clock else ""
        if use:
            notes.append(f"the {_kind(request.device)} was busy with other work: {use}")
        if use and request.device != "cpu" and not request.allow_busy:
            busy = f"the GPU is busy with other work: {use} (--allow-busy measures all the same)"
            outcome = Outcome("nothing", 3, (busy,))
            return _record(sides, request, measuring, outcome, [], (), notes, started, time.monotonic() - clock, None)
        own = _own_ids(sides, request)
        if own is None:
            notes.append("which workloads the base's own harness had is not known: none that is gone can be named")
        changes, rows = _verified(sides, request, measuring, own or set())
        judgements: dict[str, Judgement] = {}
        refused = None
        if request.clock:
            timed = [workload for workload in request.workloads if rows[workload.id].state is State.UNTIMED]
            judgements, again = _time(measuring, request, timed, rows, store, clock + 60 * plan.minutes)
            rows |= again
            rules = {name: request.thresholds.rule(name, plan.looks) for name in judgements}
            refused = refused_threshold(judgements, rules)
        table = [rows[workload.id] for workload in request.workloads]
        table += [row for name, row in rows.items() if name not in {w.id for w in request.workloads}]
        outcome = decide(table, changes, clock=request.clock, refused=refused, accept=request.accept)
        seconds = time.monotonic() - clock
        record = _record(sides, request, measuring, outcome, table, changes, notes, started, seconds, judgements)
    except ProcessError as error:
        raise SideError(str(error)) from error
    finally:
        measuring.close()
    store.finish()
    return record


def _verified(
    sides: Sides, request: Request, measuring: Measuring, own: set[str]
) -> tuple[list[Change], dict[str, WorkloadRecord]]:
    """What differs without a clock, and a row for each workload, nothing of it timed yet."""
    changes: list[Change] = []
    if sides.head.subject == MOEGATE:
        compiled = _COMPILED_ON_CPU if request.device == "cpu" else 0
        said = measuring.describe(request.workloads, compiled)
        changes = compare(*(Described(**said[name]) for name in SIDES))
    answers = measuring.check(request.workloads)
    rows = {}
    for workload in request.workloads:
        base, head = answers["base"][workload.id], answers["head"][workload.id]
        differs: list[Change] = []
        if "paths" in base and "paths" in head:
            differs = compare_paths(workload.id, base["paths"], head["paths"])
            differs += compare_kernels(
                {f"{workload.id} {name}": each for name, each in base["kernels"].items()},
                {f"{workload.id} {name}": each for name, each in head["kernels"].items()},
            )
        rows[workload.id] = plain_row(
            workload, base, head, accept(differs, request.accept), is_known=workload.id in own
        )
    rows |= renamed(own, request.workloads, request.accept)
    return accept(changes, request.accept), rows


def _time(
    measuring: Measuring,
    request: Request,
    workloads: Sequence[Workload],
    rows: Mapping[str, WorkloadRecord],
    store: Store,
    deadline: float,
) -> tuple[dict[str, Judgement], dict[str, WorkloadRecord]]:
    """Time the workloads, and those again that are suspect or unclear; their judgements and rows."""
    plan, answers = request.plan, {name: store.checks(name) or {} for name in SIDES}
    rotations = {workload.id: answers["head"][workload.id] for workload in workloads}
    first_deadline = deadline - _RESERVED * 60 * plan.minutes
    left, number, last = list(workloads), 0, 0.0
    while left and number < plan.pairs and (number < 2 or time.monotonic() + last < first_deadline):
        began = time.monotonic()
        measuring.pair(number, left, rotations, more=number + 1 < plan.pairs)
        last, number = time.monotonic() - began, number + 1
    first_look, judgements = number, {}
    for look in range(1, plan.looks + 1):
        evidence = {
            workload.id: each for workload in workloads if (each := evidence_of(store.cells(workload.id), first_look))
        }
        rules = {name: request.thresholds.rule(name, plan.looks) for name in evidence}
        judgements = judge(evidence, rules)
        if look == plan.looks or (judgements and refused_threshold(judgements, rules)):
            break
        left = [
            workload
            for workload in workloads
            if workload.id not in judgements or is_open(judgements[workload.id], rules[workload.id])
        ]
        again = sum(measuring.seconds_by_workload.get(workload.id, 0.0) for workload in left) + last / 10
        for more in range(plan.again):
            if not left or time.monotonic() + again > deadline:
                break
            number = plan.pairs + (look - 1) * plan.again + more
            measuring.pair(number, left, rotations, more=more + 1 < plan.again)
    timed = {}
    for workload in workloads:
        row, cells = rows[workload.id], store.cells(workload.id)
        timed[workload.id] = timed_row(row, cells, judgements.get(workload.id), plan.pairs)
    return judgements, timed


def _own_ids(sides: Sides, request: Request) -> set[str] | None:
    """The ids of the workloads that the base's own harness selects by the same words; None where it cannot say."""
    if sides.base.subject != MOEGATE or sides.base.tree == sides.head.tree:
        return {workload.id for workload in request.workloads}
    code = (
        "import json, sys\n"
        "from moegate.bench.selection import choose_device, select_workloads\n"
        "words = {name: value for name, value in json.loads(sys.argv[2]).items() if value is not None}\n"
        "chosen = select_workloads(choose_device(sys.argv[1]), **words)\n"
        "print(json.dumps([workload.id for workload in chosen if not workload.unsupported]))\n"
    )
    environment = sides.base.environment()
    inherited = environment["PYTHONPATH"].partition(str(sides.base.python_path[-1]))[2]
    environment["PYTHONPATH"] = f"{own_site(sides)}{inherited}"
    command = [sys.executable, "-c", code, request.device, json.dumps(dict(request.selection))]
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=sides.base.tree,
            capture_output=True,
            text=True,
            timeout=_OWN_SECONDS,
            check=True,
        )
        return set(json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return None


def _record(
    sides: Sides,
    request: Request,
    measuring: Measuring,
    outcome: Outcome,
    table: Sequence[WorkloadRecord],
    changes: Sequence[Change],
    notes: Sequence[str],
    started: datetime,
    seconds: float,
    judgements: Mapping[str, Judgement] | None,
) -> GateRecord:
    return GateRecord(
        verdict=outcome.verdict,
        exit_code=outcome.exit_code,
        why=outcome.why,
        base=sides.base.record,
        head=sides.head.record,
        device=str(measuring.machine.get("device", request.device)),
        machine=measuring.machine,
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        clock=request.clock,
        can_see=table_can_see(judgements) if judgements else None,
        plan=asdict(request.plan),
        workloads=tuple(table),
        changes=tuple(changes),
        notes=tuple(notes),
    )


def _kind(device: str) -> str:
    return "CPU" if device == "cpu" else "GPU"
