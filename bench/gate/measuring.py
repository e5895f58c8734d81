"""The gate's processes at work: verify both sides, then let pairs of fresh processes take turns on the device."""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..workloads import Workload
from .process import ProcessError, SideProcess
from .sides import Side, Sides
from .sm_clock import other_use
from .store import Store
from .verdict import effect_error
from .worker import workload_as_data

_HELLO_SECONDS, _CHECK_SECONDS, _PREPARE_SECONDS, _BLOCK_SECONDS = 180.0, 600.0, 300.0, 60.0
_MOST_PASSES = 200
# Of a cell's effect: its standard error, above which as many rounds are added, up to so many times the plan's.
_KNOWN_WITHIN, _MOST_TIMES = 0.002, 2
# Of the highest SM clock: below it a GPU is held back by something that is not the code.
_THROTTLED = 0.6
SIDES = ("base", "head")

Progress = Callable[[str, int, int], None]
"""Told what is done: a phase, steps done, and steps in all."""


@dataclass(frozen=True)
class Plan:
    """How a run measures.

    Attributes:
        pairs: of processes at first.
        again: pairs more for what is suspect, unclear, or SAME only by a bound above the threshold.
        looks: times that the table is judged at most.
        rounds: in which both sides take a turn, of each pair; even, since each side goes first in half of them. Twice
            as many where they disagree.
        block_seconds: of one turn; a pass at least.
        minutes: for everything; what is unclear then stays so.
        checkers: processes of each side that verify side by side.
        seed: of all orders.
    """

    pairs: int = 5
    again: int = 3
    looks: int = 2
    rounds: int = 6
    block_seconds: float = 0.008
    minutes: float = 6.0
    checkers: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("pairs", 2), ("again", 2), ("looks", 1), ("rounds", 2), ("checkers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.rounds % 2:
            raise ValueError(f"rounds: expected an even number, got {self.rounds}")
        for name in ("block_seconds", "minutes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")


class Measuring:
    """Both sides on one device.

    Args:
        sides: what to measure.
        device: "cpu", "cuda" or "cuda:N".
        plan: how.
        store: where results go, and from which they are resumed.
        levels: slow-downs to inject into the head, for the gate's own error rates.
        progress: told what is done.
    """

    def __init__(
        self,
        sides: Sides,
        device: str,
        plan: Plan,
        store: Store,
        *,
        levels: Sequence[float] = (),
        progress: Progress = lambda *_: None,
    ) -> None:
        self._sides, self._device, self.plan, self._store = sides, device, plan, store
        self._levels, self._progress = list(levels), progress
        self._waiting: tuple[SideProcess, SideProcess] | None = None
        self.machine: dict[str, Any] = {}
        self.most_mhz: float | None = None
        self.seconds_by_workload: dict[str, float] = {}
        self._passes: dict[str, int] = {}
        self._asked: dict[str, dict[str, float]] = {}

    def close(self) -> None:
        """End processes that wait for their turn."""
        if self._waiting is not None:
            for process in self._waiting:
                process.kill()
            self._waiting = None

    def other_use(self) -> str:
        """What uses the device before we do; empty where nothing does or nobody says."""
        if self._device == "cpu":
            return other_use(torch.device("cpu"))
        with self._start(self._sides.head) as process:
            return str(process.ask("busy", limit=_HELLO_SECONDS)["busy"])

    def describe(self, workloads: Sequence[Workload], compiled: int) -> dict[str, dict[str, Any]]:
        """Of each side, what it would do on platforms that are not here (`guards.describe`).

        Raises:
            ProcessError: a side cannot say.
        """
        data = [workload_as_data(workload) for workload in workloads]

        def of(side: Side) -> dict[str, Any]:
            with self._start(side) as process:
                return process.ask("describe", limit=_CHECK_SECONDS, workloads=data, compiled=compiled)

        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(of, (self._sides.base, self._sides.head)))
        return dict(zip(SIDES, said, strict=True))

    def check(
        self, workloads: Sequence[Workload], names: Sequence[str] = SIDES
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Verify every workload on both sides, compiling on the way; by side and workload, `Worker.check` or an error.

        Args:
            workloads: which.
            names: of the sides; one where both are the same files.

        Raises:
            ProcessError: a side's processes do not start: it does not build.
        """
        by_model: dict[tuple[str, str], list[Workload]] = {}
        for workload in workloads:
            by_model.setdefault((workload.model.name, workload.dtype), []).append(workload)
        sides = [side for side in (self._sides.base, self._sides.head) if side.name in names]
        jobs = [(side, group) for group in by_model.values() for side in sides]
        jobs = [(side, group) for side, group in jobs if self._store.checks(side.name) is None]
        done, total = [0], sum(len(group) for _, group in jobs)

        def run(job: tuple[Side, list[Workload]]) -> tuple[str, dict[str, Any]]:
            side, group = job
            return side.name, self._check_group(side, group, lambda: self._count("verifying", done, total))

        found: dict[str, dict[str, Any]] = {name: self._store.checks(name) or {} for name in names}
        with ThreadPoolExecutor(2 * self.plan.checkers) as pool:
            for name, answers in pool.map(run, jobs):
                found[name] |= answers
        for name in names:
            self._store.put_checks(name, found[name])
        return found

    def _count(self, phase: str, done: list[int], total: int) -> None:
        done[0] += 1
        self._progress(phase, done[0], total)

    def _check_group(self, side: Side, group: list[Workload], count: Callable[[], None]) -> dict[str, Any]:
        answers: dict[str, Any] = {}
        process: SideProcess | None = None
        try:
            for workload in group:
                if process is None:
                    process = self._start(side)
                    hello = process.ask("hello", limit=_HELLO_SECONDS)
                    self.machine = self.machine or hello["machine"]
                try:
                    answers[workload.id] = process.ask(
                        "check", limit=_CHECK_SECONDS, workload=workload_as_data(workload)
                    )
                except ProcessError as error:
                    answers[workload.id] = {"error": str(error)}
                    process.kill()  # what an error leaves of a GPU's context is not to be trusted
                    process = None
                count()
        finally:
            if process is not None:
                process.close()
        return answers

    def pair(self, number: int, workloads: Sequence[Workload], plans: dict[str, dict[str, Any]], more: bool) -> None:
        """Measure workloads with one pair of fresh processes; cells that the store has already are left as they are.

        Args:
            number: of the pair, which seeds all orders.
            workloads: which.
            plans: by workload, its rotation's `calls` and `copies`.
            more: whether another pair is likely to follow, so that it may start importing.
        """
        order = random.Random(f"{self.plan.seed} {number}")
        left = [workload for workload in workloads if self._store.cell(number, workload.id) is None]
        left = _by_model_shuffled(left, order)
        done = [len(workloads) - len(left)]
        while left:
            processes = self._take_pair(order)
            try:
                if more and self._device != "cpu":
                    self._waiting = self._start_pair(order)
                while left:
                    workload = left.pop(0)
                    started = time.monotonic()
                    cell = self._cell(processes, workload, plans[workload.id], order)
                    self._store.put(number, workload.id, cell)
                    self.seconds_by_workload[workload.id] = time.monotonic() - started
                    self._count(f"pair {number + 1}", done, len(workloads))
                    if "error" in cell:
                        break  # with new processes
            finally:
                for process in processes:
                    process.kill()

    def _cell(
        self, processes: tuple[SideProcess, SideProcess], workload: Workload, plan: dict[str, Any], order: random.Random
    ) -> dict[str, Any]:
        """What a pair measures of a workload: seconds and SM clock of each turn, or why there are none."""
        by_name, began = dict(zip(SIDES, processes, strict=True)), time.monotonic()
        try:
            for process in processes:
                process.send("prepare", workload=workload_as_data(workload), calls=plan["calls"], copies=plan["copies"])
            made = {name: process.answer(_PREPARE_SECONDS) for name, process in by_name.items()}
            # From here on one side at a time uses the device: a time that was taken beside another process's work,
            # which gets its share of the device, is no time of the layer.
            if workload.id not in self._passes:
                seconds = max(process.ask("pace", limit=_BLOCK_SECONDS)["seconds"] for process in processes)
                self._passes[workload.id] = max(1, min(_MOST_PASSES, int(self.plan.block_seconds / seconds)))
            prepared, reached, levels = time.monotonic(), {}, []
            if self._levels:
                asked = self._asked.setdefault(workload.id, {})
                injected = by_name["head"].ask("inject", limit=_PREPARE_SECONDS, levels=self._levels, asked=asked)
                asked |= injected["asked"]
                reached, levels = injected["reached"], injected["injected"]
            slowed = time.monotonic()
            cell = self._take_turns(by_name, self._passes[workload.id], levels, order)
            took = {"prepare": prepared - began, "inject": slowed - prepared, "turns": time.monotonic() - slowed}
            most = self.most_mhz
            clocks = [mhz for name in SIDES for mhz in cell[f"{name}_mhz"]]
            if most and clocks and statistics.median(clocks) < _THROTTLED * most:
                cell["throttled"] = f"{statistics.median(clocks):.0f} of {most:.0f} MHz"
            return cell | {
                "method": made["head"]["method"],
                "reached": reached,
                "took": {phase: round(seconds, 3) for phase, seconds in took.items()},
                "prepared": made["head"].get("took", {}),
            }
        except ProcessError as error:
            return {"error": str(error)}

    def _take_turns(
        self, by_name: dict[str, SideProcess], passes: int, levels: Sequence[float], order: random.Random
    ) -> dict[str, Any]:
        """Seconds of each turn by round: of both sides, and of each level with those of the base beside it.

        Every second round is the one before in reverse, so that each side goes first in half of them, and what drifts
        evenly cancels. Where the rounds disagree, as where a GPU at its power limit changes its clocks every few turns,
        as many again are added.
        """
        cell: dict[str, Any] = {name: [] for name in SIDES} | {f"{name}_mhz": [] for name in SIDES}
        for name in ("injected", "injected_base"):
            cell[name] = {str(level): [] for level in levels}
        for _ in range(_MOST_TIMES):
            for _ in range(self.plan.rounds // 2):
                turns = _round(levels, order)
                for turn in turns + turns[::-1]:
                    self._turn(by_name[turn.side], turn, passes, cell)
            if effect_error(cell["base"], cell["head"]) <= _KNOWN_WITHIN:
                break
        return cell

    def _turn(self, process: SideProcess, turn: _Turn, passes: int, cell: dict[str, Any]) -> None:
        level = turn.levels[0] if turn.side == "head" else ""
        answer = process.ask("block", limit=_BLOCK_SECONDS, passes=passes, level=level)
        for beside in turn.levels:
            if beside:
                cell["injected" if turn.side == "head" else "injected_base"][beside].append(answer["seconds"])
            else:
                cell[turn.side].append(answer["seconds"])
                if answer["mhz"] is not None:
                    cell[f"{turn.side}_mhz"].append(answer["mhz"])

    def _take_pair(self, order: random.Random) -> tuple[SideProcess, SideProcess]:
        processes, self._waiting = self._waiting or self._start_pair(order), None
        try:
            for process in order.sample(processes, 2):
                hello = process.ask("hello", limit=_HELLO_SECONDS)
                self.machine = self.machine or hello["machine"]
                self.most_mhz = hello["most_mhz"]
        except ProcessError:
            for process in processes:
                process.kill()
            raise
        return processes

    def _start_pair(self, order: random.Random) -> tuple[SideProcess, SideProcess]:
        sides = [self._sides.base, self._sides.head]
        order.shuffle(sides)  # neither is always the first to take memory
        started = {side.name: self._start(side) for side in sides}
        return started["base"], started["head"]

    def _start(self, side: Side) -> SideProcess:
        environment = side.environment()
        if self._device == "cpu":
            # Threads that wait for each other on a busy machine would be most of the noise.
            environment.setdefault("OMP_NUM_THREADS", "1")
        else:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (2 * self.plan.checkers))))
        return SideProcess(side.name, environment, Path(side.tree), (side.subject, self._device))


@dataclass(frozen=True)
class _Turn:
    """Of one side in a round: the head's at a level ("" is none), or the base's, which the levels beside it share."""

    side: str
    levels: tuple[str, ...]


def _round(levels: Sequence[float], order: random.Random) -> list[_Turn]:
    """A turn of the plain head and one at each level, in random order, each with a turn of the base right beside it."""
    heads = order.sample(["", *map(str, levels)], len(levels) + 1)
    turns = []
    for i in range(0, len(heads), 2):
        beside = tuple(heads[i : i + 2])
        group = [_Turn("head", (beside[0],)), _Turn("base", beside), *(_Turn("head", (each,)) for each in beside[1:])]
        turns += group if len(group) == 3 else order.sample(group, 2)
    return turns


def _by_model_shuffled(workloads: list[Workload], order: random.Random) -> list[Workload]:
    """In random order, but with a model's together, since its weights are made once."""
    by_model: dict[tuple[str, str], list[Workload]] = {}
    for workload in workloads:
        by_model.setdefault((workload.model.name, workload.dtype), []).append(workload)
    groups = list(by_model.values())
    order.shuffle(groups)
    return [workload for group in groups for workload in order.sample(group, len(group))]
