"""From paired times to verdicts: pure functions of numbers, calibrated on simulated noise and on real A/A runs.

The unit of evidence is a pair of processes, one of the base and one of the head, that took turns on one device: what
differs between processes (where memory lies, which clocks were found) is noise that no number of samples within a
process averages out. Each pair gives one effect, log(head / base). A workload has few of them, so that their spread is
poorly known; the table's other workloads lend theirs (the moderated t statistic of Smyth, "Linear models and empirical
Bayes methods for assessing differential expression", 2004). Over the table false discoveries are controlled (Benjamini
and Hochberg 1995), and an interval is that of the discoveries (Benjamini and Yekutieli 2005): it excludes zero exactly
where the change is one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special, stats

from ..spread import robust_deviation
from .record import Verdict

# Pairs agree by chance to the last bit, on a host's clock above all; no measurement is better than this.
_RESOLUTION = 1e-4


@dataclass(frozen=True)
class Rule:
    """When a change counts.

    Attributes:
        threshold: the least change that counts, as a fraction of the base's time.
        strict: SAME is said only of changes below `threshold`; else of those below what can be seen here, if that is
            more, but never more than `most`.
        level: of false discoveries over the table.
        miss: the chance that a change of the threshold is called SAME.
        power: the share of runs in which a change of `can_see` is a discovery.
        looks: times that the table may be judged at most; each look spends its share of `level`.
        most: where only larger changes can be seen, nothing is called SAME.

    Raises:
        ValueError: a number out of its range.
    """

    threshold: float = 0.01
    strict: bool = False
    level: float = 0.01
    miss: float = 0.05
    power: float = 0.8
    looks: int = 2
    most: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and 0 < self.threshold < 1):
            raise ValueError(f"threshold: expected a fraction above 0 and below 1, got {self.threshold}")
        for name in ("level", "miss", "power"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: expected more than 0 and less than 1, got {getattr(self, name)}")
        if self.looks < 1:
            raise ValueError(f"looks: expected at least 1, got {self.looks}")


@dataclass(frozen=True)
class Evidence:
    """What was measured of one workload.

    Attributes:
        effects: of each pair of processes, log(head / base), the first look's before all others.
        first_look: how many of them belong to the first look.
        clock_effects: of each pair, log of the head's SM clock over the base's; empty where it cannot be read.
    """

    effects: tuple[float, ...]
    first_look: int
    clock_effects: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.effects) < 2:
            raise ValueError(f"effects: expected those of at least 2 pairs, got {len(self.effects)}")
        if not all(math.isfinite(effect) for effect in self.effects):
            raise ValueError(f"effects: expected finite numbers, got {self.effects}")
        if not 2 <= self.first_look <= len(self.effects):
            raise ValueError(f"first_look: expected 2 to {len(self.effects)} pairs, got {self.first_look}")
        if self.clock_effects and len(self.clock_effects) != len(self.effects):
            raise ValueError(
                f"clock_effects: expected one a pair ({len(self.effects)}) or none, got {len(self.clock_effects)}"
            )

    @property
    def fresh(self) -> tuple[float, ...]:
        """Effects of the pairs after the first look, none of which made anybody suspicious."""
        return self.effects[self.first_look :]


@dataclass(frozen=True)
class Judgement:
    """What is said of one workload; changes are fractions of the base's time.

    Attributes:
        verdict: of the four.
        change: head over base, minus one.
        low, high: its interval at the level that the table's discoveries leave.
        p_value: of no change, two-sided; `adjusted` for the table (Benjamini-Hochberg).
        can_see: the least change that is a discovery in `Rule.power` of runs.
        threshold: what SAME was held against.
        suspect: the first look alone would have flagged it, and nothing was measured again since.
        why: in words.
    """

    verdict: Verdict
    change: float
    low: float
    high: float
    p_value: float
    adjusted: float
    can_see: float
    threshold: float
    suspect: bool
    why: str


def pair_effect(base: Sequence[float], head: Sequence[float]) -> float:
    """log(head / base) of one pair of processes, from the rounds in each of which both took their turn.

    It is the median of the rounds' means by twos (Hodges and Lehmann 1963): a disturbed round in four moves it little,
    and what drifts cancels where each side went first in half of the rounds.

    Raises:
        ValueError: no round, or another number of both.
    """
    ratios = _ratios(base, head)
    return statistics.median((a + b) / 2 for i, a in enumerate(ratios) for b in ratios[i:])


def effect_error(base: Sequence[float], head: Sequence[float]) -> float:
    """The standard error of `pair_effect` as far as the rounds show it, from their median absolute deviation.

    A disturbed round counts for little here too. What differs between processes no round shows.

    Raises:
        ValueError: no round, or another number of both.
    """
    ratios = _ratios(base, head)
    # Of a few rounds, whose own middle is taken, the deviation is smaller: as if there were two less.
    return robust_deviation(ratios) / math.sqrt(max(1, len(ratios) - 2))


def _ratios(base: Sequence[float], head: Sequence[float]) -> list[float]:
    if not base or len(base) != len(head):
        raise ValueError(f"rounds: expected as many of both and at least one, got {len(base)} and {len(head)}")
    return [math.log(h / b) for b, h in zip(base, head, strict=True)]


@dataclass(frozen=True)
class Prior:
    """What the table's other workloads say of one's spread: `variance`, worth `dof` degrees of freedom."""

    variance: float
    dof: float


def spread_of_table(variances: Sequence[float], dofs: Sequence[int]) -> Prior:
    """The scaled inverse chi-square distribution from which the table's variances come, by moments of their logarithm.

    Workloads that are all alike lend each other everything, and those that differ widely lend little.

    Args:
        variances: of each workload's effects.
        dofs: their degrees of freedom, at least 1 each.
    """
    if len(variances) < 3:
        return Prior(0.0, 0.0)
    half = np.asarray(dofs, dtype=float) / 2
    logs = np.log(np.maximum(np.asarray(variances), _RESOLUTION**2)) - special.digamma(half) + np.log(half)
    centre = float(logs.mean())
    excess = float(logs.var(ddof=1) - special.polygamma(1, half).mean())
    # More than all of the table's degrees of freedom nobody can lend.
    most = float(np.sum(dofs))
    if excess <= float(special.polygamma(1, most / 2)):
        return Prior(math.exp(centre), most)
    dof = 2 * float(optimize.brentq(lambda x: float(special.polygamma(1, x)) - excess, 1e-6, most / 2))
    return Prior(math.exp(centre + float(special.digamma(dof / 2)) - math.log(dof / 2)), dof)


@dataclass(frozen=True)
class _Fit:
    mean: float
    error: float
    dof: float

    @property
    def p_value(self) -> float:
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.dof))

    def quantile(self, tail: float) -> float:
        """How many standard errors leave `tail` above them."""
        return float(stats.t.isf(tail, self.dof))


def _fit(effects: Sequence[float], prior: Prior, most: float = math.inf) -> _Fit:
    count = len(effects)
    dof = count - 1
    variance = statistics.variance(effects) if dof else 0.0
    pooled = (dof * variance + prior.dof * prior.variance) / (dof + prior.dof) if dof + prior.dof else variance
    error = math.sqrt(max(pooled, _RESOLUTION**2) / count)
    return _Fit(statistics.fmean(effects), error, max(1.0, min(dof + prior.dof, most)))


def judge(table: Mapping[str, Evidence], rules: Mapping[str, Rule] | Rule) -> dict[str, Judgement]:
    """A verdict for each workload of a table.

    SLOWER and FASTER: the interval excludes zero, the estimate reaches the threshold, and pairs measured after the
    first look say so by themselves. Without such pairs it is UNCLEAR, and `suspect`. SAME: a change of the threshold
    is excluded, or else of what can be seen (`Judgement.threshold` says which). UNCLEAR: anything else.

    Args:
        table: what was measured, by workload.
        rules: of all, or of each; `level` and `looks` are those of the table, and so the same in each.

    Raises:
        ValueError: rules whose levels or looks differ, or a workload without a rule.
    """
    if not table:
        return {}
    if isinstance(rules, Rule):
        rules = dict.fromkeys(table, rules)
    missing = [name for name in table if name not in rules]
    if missing:
        raise ValueError(f"rules: expected one for each workload, got none for {', '.join(missing)}")
    if len({(rules[name].level, rules[name].looks) for name in table}) > 1:
        raise ValueError("rules: expected one level and one number of looks for the table, got several")
    some = rules[next(iter(table))]
    level = some.level / some.looks
    dofs = [len(evidence.effects) - 1 for evidence in table.values()]
    prior = spread_of_table([statistics.variance(evidence.effects) for evidence in table.values()], dofs)
    fits = {name: _fit(evidence.effects, prior, sum(dofs)) for name, evidence in table.items()}
    p_values = [fit.p_value for fit in fits.values()]
    adjusted = stats.false_discovery_control(p_values)
    discoveries = max(1, int((adjusted <= level).sum()))
    tail = level * discoveries / len(table) / 2
    return {
        name: _judge_one(table[name], fit, rules[name], tail, float(each), is_discovery=bool(each <= level))
        for (name, fit), each in zip(fits.items(), adjusted, strict=True)
    }


def _judge_one(
    evidence: Evidence, fit: _Fit, rule: Rule, tail: float, adjusted: float, *, is_discovery: bool
) -> Judgement:
    half = fit.quantile(tail) * fit.error
    can_see = math.expm1(half + fit.quantile(1 - rule.power) * fit.error)
    bound = rule.threshold if rule.strict else max(rule.threshold, min(can_see, rule.most))
    change = math.expm1(fit.mean)
    judgement = Judgement(
        verdict=Verdict.UNCLEAR,
        change=change,
        low=math.expm1(fit.mean - half),
        high=math.expm1(fit.mean + half),
        p_value=fit.p_value,
        adjusted=adjusted,
        can_see=can_see,
        threshold=bound,
        suspect=False,
        why="",
    )
    if is_discovery and abs(fit.mean) >= math.log1p(rule.threshold):
        return _flagged(judgement, evidence, fit, rule)
    margin = fit.quantile(rule.miss) * fit.error
    for least in (rule.threshold, bound):
        if abs(fit.mean) + margin < math.log1p(least):
            why = f"less than {least:.1%}" + (f", though {_words(change)}" if is_discovery else "")
            return replace(judgement, verdict=Verdict.SAME, threshold=least, why=why)
    return replace(
        judgement, why=f"between {judgement.low:+.1%} and {judgement.high:+.1%}: {bound:.1%} is not excluded"
    )


def is_open(judgement: Judgement, rule: Rule) -> bool:
    """Whether more pairs may change what is said: it is UNCLEAR, or SAME only by a bound coarser than the threshold.

    Where the spread of pairs hides a change of the threshold, SAME would else be said of a slow-down that pairs more
    can show.
    """
    return judgement.verdict is Verdict.UNCLEAR or (
        judgement.verdict is Verdict.SAME and judgement.threshold > rule.threshold
    )


def _flagged(judgement: Judgement, evidence: Evidence, fit: _Fit, rule: Rule) -> Judgement:
    """A change that the whole evidence shows: it counts if fresh pairs alone, and the clocks, agree."""
    direction = math.copysign(1.0, fit.mean)
    words = _words(judgement.change)
    if evidence.clock_effects:
        clock = statistics.fmean(evidence.clock_effects)
        # Fewer cycles a second stretch a time without a cycle more: what only the clock explains is no change.
        if direction * (fit.mean + clock) < math.log1p(rule.threshold) and direction * clock < 0:
            why = f"{words}, but the head's SM clock was {math.expm1(clock):+.1%}, which may explain it"
            return replace(judgement, why=why)
    if not evidence.fresh:
        return replace(judgement, suspect=True, why=f"{words}; to be measured again before it counts")
    # The spread is that of all pairs, since the fresh ones are few; their mean is theirs alone.
    error = fit.error * math.sqrt(len(evidence.effects) / len(evidence.fresh))
    again = _Fit(statistics.fmean(evidence.fresh), error, fit.dof)
    agrees = direction * again.mean >= math.log1p(rule.threshold) / 2
    if not (agrees and again.p_value / 2 <= rule.miss):
        why = f"{words} at first, and {_words(math.expm1(again.mean))} when measured again"
        return replace(judgement, why=why)
    verdict = Verdict.SLOWER if direction > 0 else Verdict.FASTER
    why = f"{words}, in {len(evidence.effects)} pairs of processes ({len(evidence.fresh)} measured again)"
    return replace(judgement, verdict=verdict, why=why)


def _words(change: float) -> str:
    return f"{abs(change):.1%} {'slower' if change > 0 else 'faster'}"


def table_can_see(judgements: Mapping[str, Judgement]) -> float | None:
    """The median of what can be seen of each workload; None for an empty table."""
    return statistics.median(j.can_see for j in judgements.values()) if judgements else None


def refused_threshold(judgements: Mapping[str, Judgement], rules: Mapping[str, Rule]) -> str | None:
    """Why a threshold that was asked for cannot be used here, in words; None where it can.

    Only strict rules ask for one. A threshold is refused where half of the workloads that it is asked for cannot show
    a change so small.
    """
    strict = {name: j for name, j in judgements.items() if rules[name].strict}
    blind = [name for name, j in strict.items() if j.can_see > rules[name].threshold]
    if not strict or 2 * len(blind) < len(strict):
        return None
    can_see = statistics.median(judgements[name].can_see for name in blind)
    asked = min(rules[name].threshold for name in blind)
    return (
        f"threshold: {asked:.2%} is below what can be seen here: {can_see:.1%} "
        f"(median of {len(blind)} of {len(strict)} workloads)"
    )
