"""Properties, verdicts and the ledger: one execution of a subject, many judgements, each counted under its own id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .spec import Spec

if TYPE_CHECKING:
    from .evidence import Evidence


class Finding(AssertionError):
    """A property that does not hold. Each property raises a class of its own, so that Hypothesis keeps them apart."""


@dataclass(frozen=True)
class Property:
    """One thing that must hold.

    Attributes:
        id: family and number, such as `ROUTE-03`.
        sentence: what must hold.
        facets: the subject's facets that it needs.
        is_value: judges numbers; every null kernel must fail it.
        needs: whether a subject's capabilities leave a case to judge.
        devices: torch device types on which it can be judged; empty means all.
        repeatable: it can be judged only of subjects that declare that the same call gives the same bits.
    """

    id: str
    sentence: str
    facets: tuple[str, ...]
    is_value: bool = False
    needs: Callable[[Any], bool] = lambda capabilities: True
    devices: tuple[str, ...] = ()
    repeatable: bool = False

    def verdict(
        self,
        holds: bool,
        detail: str = "",
        *,
        budget_used: float | None = None,
        evidence: Evidence | None = None,
    ) -> Verdict:
        """This property's verdict on one execution."""
        return Verdict(self, bool(holds), detail, budget_used, evidence)


PROPERTIES: dict[str, Property] = {}
_finding_classes: dict[str, type[Finding]] = {}


def declare(
    id: str,
    sentence: str,
    *facets: str,
    is_value: bool = False,
    needs: Callable[[Any], bool] = lambda capabilities: True,
    devices: tuple[str, ...] = (),
    repeatable: bool = False,
) -> Property:
    """Register a property.

    Raises:
        ValueError: an id that is taken.
    """
    if id in PROPERTIES:
        raise ValueError(f"id: {id} is declared twice")
    PROPERTIES[id] = Property(id, sentence, facets, is_value, needs, devices, repeatable)
    _finding_classes[id] = type(f"{id.replace('-', '_')}_Violated", (Finding,), {"__doc__": sentence})
    return PROPERTIES[id]


@dataclass(frozen=True)
class Verdict:
    """What one property says of one execution.

    Attributes:
        budget_used: the statistic over its limit, where there is one: the conformance score, 1 is the limit.
        evidence: where the output is worst and what its numbers are, of properties of values.
    """

    property: Property
    holds: bool
    detail: str = ""
    budget_used: float | None = None
    evidence: Evidence | None = None


@dataclass
class Tally:
    """One property over a run.

    Attributes:
        cases: executions judged.
        violated: how many of them violated it, those of Hypothesis's shrinking included.
        known: how many violated it as a known failure says.
        budget_used: the largest seen, where the property has one.
        finding: the newest violation's text: Hypothesis runs the minimal one last.
        spec, replay, evidence: the same violation's.
        used: how many cases used how much of the budget, by whole hundredths.
    """

    cases: int = 0
    violated: int = 0
    budget_used: float | None = None
    finding: str = ""
    known: int = 0
    spec: str = ""
    replay: str = ""
    evidence: dict[str, Any] | None = None
    used: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Merge another worker's count."""
        self.cases += other.cases
        self.violated += other.violated
        self.known += other.known
        used = [u for u in (self.budget_used, other.budget_used) if u is not None]
        self.budget_used = max(used) if used else None
        self.used.update(other.used)
        if other.finding:
            self.finding, self.spec, self.replay = other.finding, other.spec, other.replay
            self.evidence = other.evidence

    def median_used(self) -> float | None:
        """The median of the budget that cases used, to a hundredth; None where no case has one."""
        counts = sorted((int(used), count) for used, count in self.used.items())
        half, seen = sum(count for _, count in counts) / 2, 0
        for used, count in counts:
            seen += count
            if seen >= half:
                return used / 100
        return None


_COUNTERS = ("executions", "pairs", "skipped", "kernels", "facts", "known", "inconclusive", "errors")


@dataclass
class Ledger:
    """What a run judged.

    Attributes:
        tallies: by property id.
        executions: calls of the subject, by variant.
        pairs: how often each pair of features was run.
        skipped: why something was not judged, and how often.
        kernels: compiled variants that were loaded, `name hash`, and by how many processes.
        facts: whatever else the run counts (the time that compiling took, say).
        known: by entry of the known failures, how many cases it met and how many of these failed.
        inconclusive: why a case has no verdict though it should, through no fault of the subject, and how often.
        errors: what a test ended with that is no finding, and how often: growth in a soak, an error of the suite's own.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    executions: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    facts: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    inconclusive: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def settle(
        self,
        verdicts: Sequence[Verdict],
        spec: Spec,
        replay: str,
        cause: BaseException | None = None,
        tolerated: Callable[[str], str | None] = lambda id: None,
    ) -> None:
        """Count the verdicts of one execution, then raise the first that does not hold and is not tolerated.

        Args:
            verdicts: of one execution.
            spec: of its case.
            replay: the command that runs it again.
            cause: what the finding is raised from.
            tolerated: the key of the known failure by which a property, by its id, may be violated on this case.

        Raises:
            Finding: the property's own class, with its id, its sentence, the detail, the spec and how to replay it.
        """
        findings = []
        for verdict in verdicts:
            prop, text = verdict.property, ""
            known = tolerated(prop.id)
            if known is not None:
                self.known.update({f"{known} met": 1, f"{known} failed": int(not verdict.holds)})
            is_violated = not verdict.holds and known is None
            if is_violated:
                text = f"{prop.id}: {prop.sentence}\n  {verdict.detail}\n  spec:   {spec!r}\n  replay: {replay}"
                findings.append(_finding_classes[prop.id](text))
            is_known = not verdict.holds and known is not None
            used = None if is_known else verdict.budget_used  # a known failure spoils no maximum
            one = Tally(1, int(is_violated), used, text, int(is_known))
            if used is not None:
                one.used[str(round(100 * used) if used <= 100 else 10_000)] = 1
            if is_violated:
                one.spec, one.replay = repr(spec), replay
                one.evidence = None if verdict.evidence is None else verdict.evidence.as_dict()
            self.tallies.setdefault(prop.id, Tally()).add(one)
        if findings:
            raise findings[0] from cause

    def failed(self, test: str, error: BaseException) -> None:
        """Keep what a test ended with, unless that is findings alone, which were counted when they were settled."""
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                self.failed(test, each)
        elif not isinstance(error, Finding):
            said = next(iter(str(error).splitlines()), "")
            self.errors[f"{test} ended with {type(error).__name__}: {said:.300}"] += 1

    def ran(self, variant: str, spec: Spec, executions: int = 1) -> None:
        """Count executions of the subject and the spec's feature pairs."""
        self.executions[variant] += executions
        self.pairs.update(f"{a} & {b}" for a, b in spec.feature_pairs())

    def merge(self, other: Ledger) -> None:
        """Add another worker's ledger."""
        for id, tally in other.tallies.items():
            self.tallies.setdefault(id, Tally()).add(tally)
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))

    def kernel_variants(self) -> dict[str, int]:
        """How many distinct variants of each kernel were loaded, by the kernel's name."""
        return dict(sorted(Counter(variant.split()[0] for variant in self.kernels).items()))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the way from an xdist worker to its controller."""
        tallies = {id: asdict(tally) | {"used": dict(tally.used)} for id, tally in self.tallies.items()}
        return {"tallies": tallies} | {name: dict(getattr(self, name)) for name in _COUNTERS}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Ledger:
        """The inverse of `as_dict`."""
        return Ledger(
            {id: Tally(**tally | {"used": Counter(tally["used"])}) for id, tally in data["tallies"].items()},
            *(Counter(data[name]) for name in _COUNTERS),
        )


def first_violated(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The first verdict that does not hold."""
    return next((v for v in verdicts if not v.holds), None)
