"""A process that has imported all that judges, never what is judged, and forks a child for each fault.

It reads jobs and writes outcomes as lines of JSON: `python -m moegate.conformance.faults.server`. A child dies with its
fault planted; one that dies on a signal, or is heard of no more, is seen by its parent, which knows the case that ran.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .hunt import hunt, silence
from .job import Job, Outcome, Witness, job_of_line
from .planting import compile_package

# Modules that import what is judged, so that every child loads them itself.
SUBJECTS = "moegate.conformance.subjects"


@dataclass
class _Child:
    job: Job
    pid: int
    pipe: int
    started: float
    heard: float
    unread: bytes = b""
    cases: int = 0
    last: tuple[str, str | None] = ("", None)
    outcome: Outcome | None = None


def _start(job: Job) -> _Child:
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            silence()

            def say(*case: str | None) -> None:
                os.write(writing, json.dumps(case).encode() + b"\n")

            outcome = hunt(job.fault, job.orders, say)
            data = memoryview(json.dumps(outcome.as_dict()).encode() + b"\n")
            while data:
                data = data[os.write(writing, data) :]
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    now = time.monotonic()
    return _Child(job, pid, reading, now, now)


def _read(child: _Child) -> bool:
    """Take in what the child says; whether it has more to say."""
    data = os.read(child.pipe, 1 << 16)
    child.heard = time.monotonic()
    *lines, child.unread = (child.unread + data).split(b"\n")
    for line in lines:
        said = json.loads(line)
        if isinstance(said, dict):
            child.outcome = Outcome.from_dict(said)
        else:
            child.cases += said[1] is not None
            child.last = (said[0], said[1])
    return bool(data)


def _ended(child: _Child, status: int, hung: bool, late: bool) -> Outcome:
    if child.outcome is not None:
        return child.outcome
    fault, orders = child.job.fault, child.job.orders
    outcome = Outcome(fault.id, fault.area, cases=child.cases, seconds=round(time.monotonic() - child.started, 2))
    if late:
        # It was still running cases, none of which had killed: slow is not wrong.
        outcome.detail = f"ended after {orders.limit_s:g} s, before all its cases had run"
    elif hung or os.WIFSIGNALED(status):
        cause = "hang" if hung else f"signal:{signal.Signals(os.WTERMSIG(status)).name}"
        # A test that announces no cases dies in one all the same, where the fault is said to kill so.
        outcome.killed, outcome.by = bool(child.cases) or cause in fault.expect, [cause]
        outcome.expected = orders.any_kill or cause in fault.expect
        outcome.witness, outcome.detail = Witness(*child.last), "the process ended"
        outcome.from_witness = orders.witness is not None and orders.witness == outcome.witness
        if not outcome.killed:
            outcome.broken = f"{cause} before the first case"
    else:
        outcome.broken = f"the process ended with status {os.waitstatus_to_exitcode(status)} and no outcome"
    return outcome


def run_jobs(jobs: Iterable[Job], processes: int) -> Iterator[Outcome]:
    """Hunt faults, `processes` at a time.

    Args:
        jobs: what to do.
        processes: children at a time.

    Yields:
        Outcomes, as they come.
    """
    waiting, running = iter(jobs), {}
    selector = selectors.DefaultSelector()
    done = False
    try:
        while True:
            while not done and len(running) < processes:
                job = next(waiting, None)
                if job is None:
                    done = True
                    break
                child = _start(job)
                running[child.pipe] = child
                selector.register(child.pipe, selectors.EVENT_READ)
            if not running:
                return
            ready = [running[key.fd] for key, _ in selector.select(timeout=1.0)]
            now = time.monotonic()
            silent = [c for c in running.values() if now - c.heard > c.job.orders.silence_s]
            late = [c for c in running.values() if c not in silent and now - c.started > c.job.orders.limit_s]
            for child in [*silent, *late]:
                os.kill(child.pid, signal.SIGKILL)
            for child in {id(c): c for c in [*ready, *silent, *late]}.values():
                hung = child in silent
                if not (hung or child in late) and _read(child):
                    continue
                _, status = os.waitpid(child.pid, 0)
                selector.unregister(child.pipe)
                os.close(child.pipe)
                del running[child.pipe]
                yield _ended(child, status, hung, child in late)
    finally:
        for child in running.values():
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


def prepare(subjects: Iterable[str], packages: Iterable[str], device: str) -> None:
    """Import what judges, and do once what every child would do: what no fault has a part in.

    Args:
        subjects: by name, of all jobs to come.
        packages: whose sources are judged.
        device: torch device type.
    """
    import torch

    from ..coverage import rows
    from ..strategies import pinned_routings
    from . import rewriting
    from .questions import oracle_questions, order_questions
    from .rehearsal import rehearse
    from .units import preload

    preload()
    torch.set_num_threads(1)
    importlib.import_module("torch._inductor.config")  # half of torch's compiler, which the first dispatch mode loads
    interprets = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if interprets:
        from .. import interpreter

        interpreter.install()
        rewriting.install()
        importlib.import_module("triton.experimental.gluon")  # as Triton does when it first looks at an argument
    oracle_questions()
    order_questions()
    for package in (SUBJECTS, *packages):
        compile_package(package)
    for declared in set(rehearse(subjects, packages, interprets=interprets)):
        for batched in (False, True):
            rows(device, declared, batched=batched)
        pinned_routings(device, declared)


def main() -> None:
    """Read one line of settings, then jobs; write a line for each outcome."""
    import torch

    settings = json.loads(sys.stdin.readline())
    prepare(settings["subjects"], settings["packages"], settings["device"])
    # Children look for garbage among their own objects alone, and copy no page of these.
    gc.collect()
    gc.freeze()
    if torch.cuda.is_initialized():
        raise RuntimeError("expected a server that never touches CUDA, which no child could use")
    loaded = [name for name in sys.modules for p in settings["packages"] if name == p or name.startswith(f"{p}.")]
    if loaded:
        raise RuntimeError(f"expected a server that never imports what is judged, found {loaded[0]}")
    jobs = (job_of_line(line) for line in sys.stdin)
    for outcome in run_jobs(jobs, settings["processes"]):
        print(json.dumps(outcome.as_dict()), flush=True)


if __name__ == "__main__":
    main()
