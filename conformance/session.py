"""One run of the suite in one process: the subject, the device, and the ledger that the tests fill."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import date
from functools import cache
from typing import Any, TypeVar
from unittest import SkipTest

import torch
from torch import Tensor

from .bounds import CHECKED
from .cases import BatchedCase, ExpertsCase
from .device_errors import Trouble, asked_for, first_line, trouble_of
from .guarded import CallError, guarded
from .isolated import Isolated
from .judge import Ledger, Verdict
from .known import KnownFailures, load_known
from .loading import load_subject
from .profiles import examples_of, explore
from .properties.hygiene import judge_form, poisoned_allocations
from .properties.subject import ENDS, RETURNS, SURVIVES, WITHIN
from .selection import SELECTION
from .soak import COMPILED
from .spec import Spec
from .strategies import POOLS
from .subject import Subject

AnyCase = TypeVar("AnyCase", ExpertsCase, BatchedCase)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


class Session:
    """What the tests of a run share.

    Attributes:
        subject: the implementation under test, whose failing calls are verdicts.
        isolated: the same, where it runs in a process of its own.
        device: torch device type.
        ledger: everything that was judged in this process.
        lost: why nothing more can be run on the device in this process; empty where it can.
    """

    def __init__(self, subject: Subject, device: str) -> None:
        self.isolated = subject if isinstance(subject, Isolated) else None
        self.subject = guarded(subject)
        self.device = device
        self.ledger = Ledger()
        self.lost = ""
        self.known = KnownFailures(load_known(SELECTION.known), subject.name, device, date.today())

    def release_memory(self) -> None:
        """Give back what torch's allocator keeps for later: other processes of the run share the GPU."""
        if self.device == "cuda" and not self.lost:
            torch.cuda.empty_cache()

    def fresh(self) -> Session:
        """A session of a subject that was never called, until the next is asked for; it counts nothing here.

        A user's file is run anew for it, or the process of an isolated subject is forked anew.
        """
        if self.isolated is not None:
            return Session(self.isolated.fresh(), self.device)
        return Session(load_subject(SELECTION.subject), self.device)

    def variants(self) -> list[str]:
        """The subject's variants that run on this device; what cannot is counted with its reason."""
        available = []
        for variant in self.subject.variants:
            reason = self.subject.unavailable(variant, self.device)
            if reason is None:
                available.append(variant)
            else:
                self.ledger.skipped[f"{variant}: {reason}"] += 1
        return available

    def explore(
        self,
        strategy: Any,
        judge: Callable[[Any], list[Verdict]],
        *,
        name: str,
        variant: str,
        examples: int,
        pinned: tuple[Spec, ...] = (),
        runs: int = 1,
        is_value: bool = False,
    ) -> None:
        """Judge drawn specs, each verdict counted, the first that does not hold raised.

        Args:
            strategy: draws specs; None: the pinned ones are all.
            judge: runs the subject on a spec and gives its verdicts.
            name: seeds the gate.
            variant: of the subject, for the count and the replay line.
            examples: cases that the gate draws.
            pinned: specs that are always run.
            runs: how often `judge` calls the subject.
            is_value: numbers are judged, of which a device may have the time for more cases.
        """
        held = [RETURNS.verdict(True)] + ([SURVIVES.verdict(True), ENDS.verdict(True)] if self.isolated else [])
        last: dict[Spec, list[Verdict]] = {}
        if self.lost:
            raise self._skip(self.lost)

        def body(spec: Spec) -> None:
            # Each smaller case that hangs too would cost as much time again, and of a device that a case broke every
            # other would say the same: the first is the one that is shown.
            if last and spec not in last:
                return
            if spec in last:
                self.settle(last[spec], spec, variant=variant)
            crash = self.known.crash(spec, variant)
            if crash is not None:
                self.ledger.known[f"{crash.key()} met"] += 1
                self.ledger.skipped[f"known to crash, not launched: {crash.issue}"] += 1
                return
            cause, launches = None, CHECKED.total()
            try:
                judged = judge(spec)
                # Of what is compiled, and of what launches nothing, nobody knows which memory it touched.
                within = [WITHIN.verdict(True)] if judged and CHECKED.total() > launches else []
                verdicts = [*held, *within, *judged]
            except CallError as error:
                verdicts, cause = [error.verdict], error.__cause__
                if error.verdict.property is ENDS:
                    last[spec] = verdicts
            except Exception as error:
                verdicts, cause = self._of_the_device(error), error
                if not verdicts:
                    return
            if self.isolated is None and any(v.property is SURVIVES and not v.holds for v in verdicts):
                last[spec] = verdicts
                self.lost = f"a case left the GPU of its process unusable (--isolate goes on after one): {spec!r}"
            self.ledger.ran(variant, spec, runs)
            if SELECTION.progress is not None:
                _tick(SELECTION.progress, runs)
            self.settle(verdicts, spec, variant=variant, cause=cause)

        count = self.examples(examples, is_value=is_value)
        explore(strategy, body, name=name, examples=count, pinned=pinned, facts=self.ledger.facts)

    def suffices(self, verdicts: Sequence[Verdict]) -> bool:
        """Whether a case that has these verdicts need not be asked for more: a judge may ask before its next call.

        It never suffices here, where a failure says all that is wrong.
        """
        del verdicts
        return False

    def _of_the_device(self, error: Exception) -> list[Verdict]:
        """The verdicts on a case that an error of the device ended outside of the subject's calls; none: it has none.

        An illegal access shows where somebody waits for the device, which may be the suite that reads the result.

        Raises:
            Exception: the error, which is none of a device.
            SkipTest: the device is gone.
        """
        trouble = trouble_of(error)
        if trouble is None:
            raise error
        if trouble is Trouble.BROKEN and self.isolated is None:
            return [SURVIVES.verdict(False, f"the device was unusable after the call: {first_line(error)}")]
        if trouble is Trouble.FULL:
            said = f"the suite's own operands did not fit into memory: {asked_for(error)} asked for"
            self.ledger.inconclusive[said] += 1
            return []
        # A GPU that is gone, or that the suite itself broke, which no case is to blame for.
        self.lost = f"the device is lost: {first_line(error)}"
        self.ledger.inconclusive[self.lost] += 1
        raise self._skip(self.lost)

    def _skip(self, reason: str) -> SkipTest:
        """What ends a test because nothing more can be run here; counted."""
        self.ledger.skipped[reason] += 1
        return SkipTest(reason)

    def settle(
        self,
        verdicts: Sequence[Verdict],
        spec: Spec,
        replay: str | None = None,
        *,
        variant: str = "",
        cause: BaseException | None = None,
    ) -> None:
        """Count verdicts and raise the first that does not hold, known failures apart.

        Args:
            verdicts: of one execution.
            spec: of its case.
            replay: the command that runs it again; that of the spec where None.
            variant: of the subject.
            cause: what the finding is raised from.
        """

        def tolerated(id: str) -> str | None:
            entry = self.known.wrong(id, spec, variant)
            return None if entry is None else entry.key()

        self.ledger.settle(verdicts, spec, replay or self.replay(spec), cause, tolerated)

    def examples(self, gate_examples: int, *, is_value: bool = False) -> int:
        """How many cases this device and profile draw where the gate draws `gate_examples` on the CPU."""
        pools = POOLS[self.device]
        return examples_of(gate_examples * (pools.value_cases if is_value else pools.cases))

    def replay(self, spec: Spec) -> str:
        """The command that runs a spec again."""
        return f'{self.command()} --spec "{spec!r}"'

    def command(self) -> str:
        """`moegate check` of this subject on this device, for a shell."""
        again = "" if SELECTION.reruns is None else f" --reruns {SELECTION.reruns}"
        return f"moegate check --subject {shlex.quote(SELECTION.subject)} --device {self.device}{again}"

    def prepared(self, case: AnyCase, variant: str) -> AnyCase:
        """The case with what the subject makes of its weights."""
        return replace(case, prepared=self.subject.prepare(case, variant))

    def run_experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """One call of the subject's experts with poisoned allocations; its form is settled before anyone reads it.

        `case` is a prepared one.
        """
        with poisoned_allocations():
            output = self.subject.experts(case, variant)
        form = judge_form(case, output)
        if not form.holds:
            raise FormError(form)
        return output

    def count_compilations(self) -> None:
        """Note the kernel variants that this process loads, and the time that compiling takes."""
        if INTERPRETED:
            return
        from triton import knobs

        compiled: set[str] = set()

        def listen(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
            del metadata_group
            self.ledger.kernels[f"{getattr(src, 'name', 'kernel')} {metadata['hash']}"] += 1
            if not cache_hit:
                self.ledger.facts[COMPILED] += metadata["hash"] not in compiled
                compiled.add(metadata["hash"])
                self.ledger.facts["compile time of all workers, ms"] += round(times.total / 1000)

        knobs.compilation.listener = listen


class FormError(Exception):
    """The subject's result has another form than declared; carries the verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.detail)
        self.verdict = verdict


def other_order() -> AbstractContextManager[None]:
    """Inside, Triton's interpreter runs the programs of a launch last to first; a GPU has no order to turn round."""
    if not INTERPRETED:
        return nullcontext()
    from . import interpreter

    return interpreter.programs_reversed()


def _tick(path: str, executions: int) -> None:
    """Say that executions are done: one byte each, appended, so that any number of workers can share the file."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, b"." * executions)
    finally:
        os.close(handle)


def default_device() -> str:
    """`cuda` where torch sees a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def current_session() -> Session:
    """This process's session, made from the selection when the first test asks."""
    if INTERPRETED:
        from . import interpreter

        interpreter.install()
    device = SELECTION.device or default_device()
    if device == "cuda" and INTERPRETED:
        raise ValueError("device: expected cpu under TRITON_INTERPRET=1, got cuda: a process has one Triton mode")
    if device == "cpu":
        # Small operands: more threads than one only get in each other's way, and xdist brings the processes.
        torch.set_num_threads(1)
    name = SELECTION.subject
    isolated = Isolated(name, device, SELECTION.timeout, SELECTION.python) if SELECTION.isolate else None
    session = Session(isolated or load_subject(name), device)
    session.count_compilations()
    return session


@contextmanager
def form_as_verdict() -> Iterator[list[Verdict]]:
    """Collects the verdict of a `FormError` raised inside, so that a wrong form is a finding and not an error."""
    verdicts: list[Verdict] = []
    try:
        yield verdicts
    except FormError as error:
        verdicts.append(error.verdict)
