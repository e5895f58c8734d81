"""The hunt for one fault, in a process of its own: plant it, run the suite's tests, stop at the first violation."""

from __future__ import annotations

import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import UnsatisfiedAssumption

from ..guarded import CallError
from ..judge import Finding, Ledger, Verdict
from ..loading import load_subject
from ..properties.subject import RETURNS
from ..selection import SELECTION
from ..session import Session
from ..spec import Spec
from .fault import Fault
from .job import Orders, Outcome, Witness
from .planting import plant
from .units import Unit, units_of

# A violation of something else than expected may come first; the hunt goes on for so many cases more.
PATIENCE = 60
# Where a fault needs features of a case, others are drawn and not run, so that more must be drawn.
DRAWN_FOR_ONE = 4
# Of a matrix: cases of each test, and the tests, but for those whose cases are many and say nothing of one fault.
FEW = 3
EVERYTHING = (
    *(
        f"test_{name}.py"
        for name in ("route", "align", "quant", "experts", "large", "subject", "batched", "meta", "api", "public")
    ),
    *("test_lora.py::row_has_its_own", "test_lora.py::every_kind", "test_lora.py::history", "test_lora.py::bad"),
    *("test_shared.py::beside_the_routed", "test_shared.py::two_streams", "test_shared.py::two_callers"),
    "test_shared.py::no_third",
    *("test_graph.py", "test_ep.py::simulated", "questions.py"),
    *("test_configs.py::found_by_name", "test_configs.py::broken", "test_configs.py::values_are_checked"),
    *("test_configs.py::shipped_file_is_reachable", "test_configs.py::no_tuned_file"),
)


class _Killed(BaseException):
    """The hunt is over; no handler of the suite's takes it for an error of a case."""


class _Hunter:
    """Counts cases and notes violations, until one that is expected."""

    def __init__(self, fault: Fault, orders: Orders, say: Callable[[str, str | None], None]) -> None:
        self.fault, self.orders, self._say = fault, orders, say
        self.outcome = Outcome(fault.id, fault.area)
        self.unit = ""
        self.explores = False
        self._left = PATIENCE
        self._began = time.monotonic()
        self._least = float("inf")
        self._cases_to_kill = 0

    @contextmanager
    def exploring(self) -> Iterator[None]:
        """Inside, a test draws cases, and one of them alone can be run again."""
        self.explores = True
        try:
            yield
        finally:
            self.explores = False

    def begins(self, spec: Spec | None) -> None:
        """A case is about to run: whoever waits for this process learns of it, should it die."""
        self._say(self.unit, None if spec is None else repr(spec))
        self._began = time.monotonic()

    def judged(self, verdicts: Sequence[Verdict], spec: Spec | None) -> None:
        """A case has been judged; one without verdicts was none."""
        if all(verdict.property is RETURNS for verdict in verdicts):
            return
        self.outcome.cases += 1
        violated = [verdict for verdict in verdicts if not verdict.holds]
        if self.orders.everything:
            for verdict in verdicts:
                self._count(verdict.property.id, not verdict.holds)
        if violated:
            self.found([verdict.property.id for verdict in violated], spec, violated[0].detail)
        elif self.outcome.killed:
            self._lose_patience()

    def raised(self, error: BaseException, spec: Spec | None) -> None:
        """A case ended with an error."""
        self.outcome.cases += 1
        if isinstance(error, CallError) and error.__cause__ is not None:
            error = error.__cause__  # what the subject itself raised
        name = f"error:{type(error).__name__}"
        if self.orders.everything:
            self._count(name, True)
        self.found([name], spec, f"{error}")

    def found(self, ids: list[str], spec: Spec | None, detail: str) -> None:
        """Something is violated."""
        ids = list(dict.fromkeys(ids))
        wanted = self.wanted(ids)
        took = time.monotonic() - self._began
        is_quicker = bool(wanted) and self.orders.quickest > 0 and took < self._least
        if not self.outcome.killed or (wanted and not self.outcome.expected) or is_quicker:
            if wanted and not self.outcome.expected:
                self._cases_to_kill, self._left = self.outcome.cases, self.orders.quickest + 1
            if wanted:
                self._least = took
            self.outcome.killed, self.outcome.expected = True, bool(wanted)
            self.outcome.by = [*wanted, *(id for id in ids if id not in wanted)]
            # A test that draws no cases is the case itself.
            self.outcome.witness = Witness(self.unit, repr(spec) if self.explores and spec is not None else None)
            self.outcome.detail = detail[:400]
        if not self.orders.everything:
            if wanted and not self.orders.quickest:
                raise _Killed
            self._lose_patience()

    def wanted(self, ids: Sequence[str]) -> list[str]:
        """Those of violated properties that the fault is expected to violate."""
        return [id for id in ids if self.orders.any_kill or id in self.fault.expect]

    def ends(self) -> None:
        """The hunt is over: cases behind the first that killed were looked at for their time alone."""
        if self.orders.quickest and self._cases_to_kill:
            self.outcome.cases = self._cases_to_kill

    def _count(self, id: str, kills: bool) -> None:
        counts = self.outcome.kills.setdefault(id, [0, 0])
        counts[0] += kills
        counts[1] += 1

    def _lose_patience(self) -> None:
        if self.orders.everything:
            return
        self._left -= 1
        if self._left < 0:
            raise _Killed


class _HuntersLedger(Ledger):
    """Tells the hunter, and never raises a finding: a case that is not the wanted one does not end the test."""

    def __init__(self, hunter: _Hunter) -> None:
        super().__init__()
        self._hunter = hunter

    def settle(self, verdicts: Sequence[Verdict], spec: Spec, *rest: Any) -> None:
        del rest
        self._hunter.judged(verdicts, spec)


class _HuntersSession(Session):
    """Announces every case before it runs, and takes an error of the subject for a violation."""

    def __init__(self, hunter: _Hunter, device: str) -> None:
        super().__init__(load_subject(SELECTION.subject), device)
        self._hunter = hunter
        self.ledger = _HuntersLedger(hunter)
        # Of an enumeration, which is fast: as many as a matrix asks.
        self.most_questions = 1000 if hunter.orders.everything else None

    def explore(self, strategy: Any, judge: Callable[[Any], list[Verdict]], **how: Any) -> None:
        def guarded(spec: Any) -> list[Verdict]:
            if not (self._hunter.orders.everything or self._hunter.fault.may_show(spec)):
                return []
            self._hunter.begins(spec)
            try:
                return judge(spec)
            except (Finding, UnsatisfiedAssumption):
                raise
            except Exception as error:
                self._hunter.raised(error, spec)
                return []

        if self._hunter.orders.everything:
            how["pinned"] = tuple(how.get("pinned", ()))[:FEW]
            how["examples"] = min(how["examples"], FEW / SELECTION.scale)
        elif self._hunter.fault.features:
            how["examples"] *= DRAWN_FOR_ONE
        with self._hunter.exploring():
            super().explore(strategy, guarded, **how)

    def suffices(self, verdicts: Sequence[Verdict]) -> bool:
        """A witness is asked for what is expected of it and no more; a search counts all that a case violates."""
        violated = [verdict.property.id for verdict in verdicts if not verdict.holds]
        return self._hunter.outcome.from_witness and bool(self._hunter.wanted(violated))

    def judged(self, verdicts: Sequence[Verdict], spec: Spec) -> None:
        """A case of a test that draws its cases itself."""
        with self._hunter.exploring():
            self._hunter.begins(spec)
            self._hunter.judged(verdicts, spec)


def _select(fault: Fault, orders: Orders) -> None:
    SELECTION.subject, SELECTION.device, SELECTION.scale = fault.subject, orders.device, orders.scale
    SELECTION.profile, SELECTION.spec, SELECTION.progress = "gate", None, None
    gate = settings.get_profile("moegate-gate")
    # Nobody reads the smallest case: a shrink would take most of the time.
    settings.register_profile(
        "moegate-gate",
        gate,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=tuple(HealthCheck),
        report_multiple_bugs=False,
    )
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def hunt(fault: Fault, orders: Orders, say: Callable[[str, str | None], None]) -> Outcome:
    """Plant the fault in this process and hunt it.

    Args:
        fault: what is planted.
        orders: how.
        say: is told the test and the case's line before each case.
    """
    started = time.monotonic()
    hunter = _Hunter(fault, orders, say)
    outcome = hunter.outcome
    try:
        _select(fault, orders)
        plant(fault.package, fault.sources())
        try:
            session = _session(hunter, orders.device)
            _run_witness(hunter, session)
            if orders.search and not (outcome.killed and outcome.expected):
                outcome.cases = 0
                for selector in EVERYTHING if orders.everything else fault.tests:
                    for unit in units_of(selector, session, fault.variants):
                        _run(unit, hunter, session)
        except _Killed:
            pass
        hunter.ends()
    except BaseException as error:
        if not outcome.killed:
            outcome.broken = "".join(traceback.format_exception_only(error)).strip()[-600:]
            where = traceback.extract_tb(error.__traceback__)[-1:]
            outcome.broken += f" ({where[0].filename}:{where[0].lineno})" if where else ""
    outcome.seconds = round(time.monotonic() - started, 2)
    return outcome


def _session(hunter: _Hunter, device: str) -> _HuntersSession:
    """With the subject loaded.

    A mutant that cannot even be imported is killed by the error; in a catalogue such an edit is a mistake.

    Raises:
        _Killed: it raises, and nothing else can be asked.
    """
    try:
        return _HuntersSession(hunter, device)
    except Exception as error:
        if not hunter.orders.any_kill:
            raise
        hunter.raised(error, None)
        raise _Killed from error


def _run_witness(hunter: _Hunter, session: Session) -> None:
    witness = hunter.orders.witness
    if witness is None:
        return
    hunter.outcome.from_witness = True
    file, _, name = witness.unit.partition("::")
    unit = next((u for u in units_of(f"{file}::{name}", session) if u.id == witness.unit), None)
    if unit is not None:
        SELECTION.spec = witness.spec
        try:
            _run(unit, hunter, session)
        finally:
            SELECTION.spec = None
    hunter.outcome.from_witness = False


def _run(unit: Unit, hunter: _Hunter, session: Session) -> None:
    hunter.unit = unit.id
    hunter.begins(None)
    try:
        unit.run(session)
    except (pytest.skip.Exception, _Killed) as stop:
        if isinstance(stop, _Killed):
            raise
    except Exception as error:
        # Outside of a case: the test itself asked the subject for something.
        hunter.raised(error, None)


def silence() -> None:
    """Whatever the suite prints in this process goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
