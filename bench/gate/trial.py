"""`python -m moegate.bench.gate.trial FILE ...`: the gate's error rates, from the files of several self-tests.

A table of the gate is some pairs of processes and some more for what is suspect. From all pairs that were measured,
tables are put together at random, a pair with all its workloads together, so that what a pair's processes share stays
shared. Each table is judged as a real run is, both looks. Tables have pairs in common, so they are not independent: the
bounds are those of as many independent tables, and the number of pairs is printed beside them.

A slow-down counts where, before any turn was taken, every pair of the table reached its level within `inject.tolerance`
in the process that was to be slowed. Where one did not, the gate was not asked to find that slow-down: the draw is
counted apart and printed, with the workloads whose draws they were.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from .inject import tolerance
from .record import Verdict, write_json
from .selftest import SCHEMA, complete
from .table import evidence_of, is_good
from .verdict import Evidence, Rule, is_open, judge, pair_effect, table_can_see

_CONFIDENCE = 0.95
_INJECTED_SHARE = 0.1


@dataclass(frozen=True)
class Rate:
    """How often something happened.

    Attributes:
        count: times.
        of: chances.
        low, high: one-sided 95 % bounds of its probability (Clopper and Pearson 1934).
    """

    count: int
    of: int
    low: float
    high: float

    @staticmethod
    def of_counts(count: int, of: int) -> Rate:
        """The rate with its bounds; of no chance at all they are zero and one."""
        low = float(stats.beta.ppf(1 - _CONFIDENCE, count, of - count + 1)) if count else 0.0
        high = float(stats.beta.ppf(_CONFIDENCE, count + 1, of - count)) if count < of else 1.0
        return Rate(count, of, low, high)

    def __str__(self) -> str:
        share = self.count / max(1, self.of)
        return f"{self.count} of {self.of} ({share:.2%}; 95 % bounds {self.low:.2%} and {self.high:.2%})"


@dataclass(frozen=True)
class Trial:
    """The gate's error rates.

    Attributes:
        files, pairs, workloads: what was measured.
        tables: put together from that.
        first, again: pairs of each table's looks.
        slower: A/A tables in which some workload was called SLOWER: false alarms, since they end with exit code 1.
        flagged: those in which one was called SLOWER or FASTER.
        unclear: the share of A/A verdicts that were UNCLEAR.
        can_see: the median over A/A tables of what can be seen.
        spread: the median over workloads of the standard deviation of pairs' effects.
        found: by injected level, how many of the slowed workloads were called SLOWER.
        not_injected: by level, the draws in which some pair had no such slow-down; in no rate.
        computed: as `found`, of all draws, with the plain head's measured times made longer by the level instead.
        reached: by level, the median slow-down of what was injected, as calibrated; `timed`, as in the turns.
        missed: by level and workload, how many of its slow-downs were found, where some were not.
        without: by level and workload, the share of pairs without the slow-down, where there are any.
        incomplete: workloads that are in no table, with the reason of the first pair that has no time of them.
        wrong: tables with injected slow-downs in which a workload without one was flagged.
        took: mean seconds of a pair: in all, to prepare (both sides at once), to inject, of turns.
    """

    files: int
    pairs: int
    workloads: int
    tables: int
    first: int
    again: int
    slower: Rate
    flagged: Rate
    unclear: float
    can_see: float
    spread: float
    found: Mapping[str, Rate]
    not_injected: Mapping[str, int]
    computed: Mapping[str, Rate]
    reached: Mapping[str, float]
    timed: Mapping[str, float]
    missed: Mapping[str, Mapping[str, Rate]]
    without: Mapping[str, Mapping[str, float]]
    incomplete: Mapping[str, str]
    wrong: Rate
    took: Mapping[str, float]


def run_trial(files: Sequence[Mapping[str, Any]], *, tables: int, first: int, again: int, seed: int = 0) -> Trial:
    """Put tables together from self-tests, and judge them.

    Raises:
        ValueError: too few pairs, no common workload, or files of unlike machines.
    """
    devices = {data["machine"]["device"] for data in files}
    if len(devices) > 1:
        raise ValueError(f"files: expected those of one GPU model, got {', '.join(sorted(devices))}")
    common = set.intersection(*(set(complete(dict(data))) for data in files)) if files else set()
    if not common:
        raise ValueError("files: expected a workload that all pairs have measured, found none")
    names = sorted(common)
    rows = [{name: data["cells"][name][pair] for name in names} for data in files for pair in range(data["pairs"])]
    if len(rows) < first + again:
        raise ValueError(f"files: expected at least {first + again} pairs of processes, got {len(rows)}")
    levels = [str(level) for level in files[0]["levels"] if all(level in data["levels"] for data in files)]
    draw = random.Random(seed)
    slower = flagged = unclear = wrong = 0
    seen: list[float] = []
    found: dict[str, dict[str, list[bool]]] = {level: {} for level in levels}
    computed: dict[str, list[bool]] = {level: [] for level in levels}
    not_injected = dict.fromkeys(levels, 0)
    for _ in range(tables):
        pairs = draw.sample(rows, first + again)
        verdicts, can_see = _judged(pairs, dict.fromkeys(names, ""), first)
        seen.append(can_see)
        slower += Verdict.SLOWER in verdicts.values()
        flagged += any(verdict in (Verdict.SLOWER, Verdict.FASTER) for verdict in verdicts.values())
        unclear += sum(verdict is Verdict.UNCLEAR for verdict in verdicts.values())
        if not levels:
            continue
        drawn = draw.sample(names, max(len(levels), round(_INJECTED_SHARE * len(names))) if len(names) > 8 else 1)
        slowed = {name: draw.choice(levels) for name in drawn}
        verdicts, _ = _judged(pairs, dict.fromkeys(names, "") | slowed, first, _lengthened)
        for name, level in slowed.items():
            computed[level].append(verdicts[name] is Verdict.SLOWER)
        for name, level in list(slowed.items()):
            if not all(is_injected(pair[name], level) for pair in pairs):
                not_injected[level] += 1
                del slowed[name]
        verdicts, _ = _judged(pairs, dict.fromkeys(names, "") | slowed, first)
        for name, level in slowed.items():
            found[level].setdefault(name, []).append(verdicts[name] is Verdict.SLOWER)
        wrong += any(verdicts[name] in (Verdict.SLOWER, Verdict.FASTER) for name in names if name not in slowed)
    cells = {name: [row[name] for row in rows] for name in names}
    good = {level: [c for each in cells.values() for c in each if is_injected(c, level)] for level in levels}
    return Trial(
        files=len(files),
        pairs=len(rows),
        workloads=len(names),
        tables=tables,
        first=first,
        again=again,
        slower=Rate.of_counts(slower, tables),
        flagged=Rate.of_counts(flagged, tables),
        unclear=unclear / (tables * len(names)),
        can_see=statistics.median(seen),
        spread=statistics.median(_spread(cells[name]) for name in names),
        found={level: _rate([hit for hits in by_name.values() for hit in hits]) for level, by_name in found.items()},
        not_injected=not_injected,
        computed={level: _rate(hits) for level, hits in computed.items()},
        reached={level: statistics.median(c["reached"][level] for c in good[level]) for level in levels if good[level]},
        timed={level: statistics.median(_slower(c, level) for c in good[level]) for level in levels if good[level]},
        missed={
            level: {name: _rate(hits) for name, hits in sorted(by_name.items()) if not all(hits)}
            for level, by_name in found.items()
        },
        without={
            level: {name: share for name in names if (share := _share_without(cells[name], level))} for level in levels
        },
        incomplete=_incomplete(files, common),
        wrong=Rate.of_counts(wrong, tables),
        took=_took(files, rows),
    )


def is_injected(cell: Mapping[str, Any], level: str) -> bool:
    """Whether a cell's head was slowed by a level, as far as was measured before its turns."""
    if level not in cell["injected"]:
        return False
    return abs(cell["reached"][level] - float(level)) <= tolerance(float(level))


def _cell(cell: Mapping[str, Any], level: str) -> dict[str, Any]:
    """The cell as if the head were slowed; files of before `injected_base` have one turn of the base a round."""
    if not level:
        return dict(cell)
    base = cell.get("injected_base", {}).get(level, cell["base"])
    return {**cell, "base": base, "head": cell["injected"][level]}


def _lengthened(cell: Mapping[str, Any], level: str) -> dict[str, Any]:
    """The cell as if every turn of the plain head had taken longer by a level."""
    return {**cell, "head": [seconds * (1 + float(level or 0)) for seconds in cell["head"]]}


def _slower(cell: Mapping[str, Any], level: str) -> float:
    slowed = _cell(cell, level)
    return math.expm1(pair_effect(slowed["base"], slowed["head"]))


def _rate(hits: Sequence[bool]) -> Rate:
    return Rate.of_counts(sum(hits), len(hits))


def _share_without(cells: Sequence[Mapping[str, Any]], level: str) -> float:
    return sum(not is_injected(cell, level) for cell in cells) / len(cells)


def _incomplete(files: Sequence[Mapping[str, Any]], common: set[str]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for data in files:
        for name, reason in data.get("failed", {}).items():
            reasons.setdefault(name, str(reason))
        for name, cells in data["cells"].items():
            bad = [str(cell.get("error") or cell.get("throttled")) for cell in cells if not is_good(cell)]
            if name not in common and (bad or len(cells) < data["pairs"]):
                reasons.setdefault(name, bad[0] if bad else "not measured by every pair")
    known = {name for data in files for name in data["cells"]} | set(reasons)
    return {name: reasons.get(name, "not in every file") for name in sorted(known - common)}


def _took(files: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Mean seconds of a pair, in all and by phase; nothing of files that do not say."""
    alls = [seconds for data in files for seconds in data.get("seconds_of_pairs", [])]
    took = {"all": statistics.fmean(alls)} if alls else {}
    for row in rows:
        for cell in row.values():
            phases = {f"prepare: {name}": seconds for name, seconds in cell.get("prepared", {}).items()}
            for phase, seconds in {**cell.get("took", {}), **phases}.items():
                took[phase] = took.get(phase, 0.0) + seconds / len(rows)
    return took


def _spread(cells: Sequence[Mapping[str, Any]]) -> float:
    evidence = evidence_of(cells, len(cells))
    return statistics.stdev(evidence.effects) if evidence else 0.0


def _judged(
    pairs: Sequence[Mapping[str, Mapping[str, Any]]],
    levels: Mapping[str, str],
    first: int,
    slowed: Callable[[Mapping[str, Any], str], dict[str, Any]] | None = None,
) -> tuple[dict[str, Verdict], float]:
    """The verdicts of one run: a look at the first pairs, and one with all of them at what was open."""
    slowed = slowed or _cell
    cells = {name: [slowed(pair[name], level) for pair in pairs] for name, level in levels.items()}

    def evidence(name: str, count: int) -> Evidence:
        found = evidence_of(cells[name][:count], first)
        if found is None:
            raise ValueError(f"{name}: expected times of at least 2 pairs")
        return found

    table = {name: evidence(name, first) for name in cells}
    for name, judgement in judge(table, Rule()).items():
        if is_open(judgement, Rule()):
            table[name] = evidence(name, len(pairs))
    judgements = judge(table, Rule())
    return {name: judgement.verdict for name, judgement in judgements.items()}, table_can_see(judgements) or 0.0


def lines(trial: Trial) -> list[str]:
    """The trial in words."""
    return [
        f"{trial.files} self-tests, {trial.pairs} pairs of processes, {trial.workloads} workloads",
        *(f"in no table: {name}: {reason}" for name, reason in trial.incomplete.items()),
        f"{trial.tables} tables of {trial.first} pairs (and {trial.again} more for what was open), put together at "
        "random, a pair's workloads together",
        f"A/A tables with a false alarm (SLOWER): {trial.slower}",
        f"A/A tables with anything flagged (SLOWER or FASTER): {trial.flagged}",
        f"A/A verdicts that were UNCLEAR: {trial.unclear:.2%}",
        f"spread of pairs: {trial.spread:.2%} (median over workloads); can see {trial.can_see:.2%}",
        *(_line_of_level(trial, level) for level in trial.found),
        *(
            f"computed {_percent(level)} (all draws, from the plain head's times): flagged {rate}"
            for level, rate in trial.computed.items()
        ),
        f"tables with injected slow-downs in which another workload was flagged: {trial.wrong}",
        *_by_workload("missed", trial.missed, lambda rate: f"{rate.count} of {rate.of} flagged"),
        *_by_workload("not injected", trial.without, lambda share: f"in {share:.0%} of pairs"),
        *([f"seconds of a pair: {_seconds(trial.took)}"] if trial.took else []),
    ]


def _line_of_level(trial: Trial, level: str) -> str:
    rate, apart = trial.found[level], trial.not_injected[level]
    if not rate.of:
        return f"injected {_percent(level)}: never, in {apart} draws"
    return (
        f"injected {_percent(level)} (reached {trial.reached[level]:.2%}, in the turns {trial.timed[level]:.2%}): "
        f"flagged {rate}; {apart} draws more had a pair without it ({rate.count / (rate.of + apart):.2%} if those were "
        "missed)"
    )


def _percent(level: str) -> str:
    return f"{100 * float(level):g}%"


def _by_workload(what: str, of: Mapping[str, Mapping[str, Any]], say: Callable[[Any], str]) -> list[str]:
    words: dict[str, list[str]] = {}
    for level, by_name in of.items():
        for name, each in by_name.items():
            words.setdefault(name, []).append(f"{_percent(level)} {say(each)}")
    return [f"{what}: {name}: {', '.join(each)}" for name, each in sorted(words.items())]


def _seconds(took: Mapping[str, float]) -> str:
    return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in took.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 0, or 4 where the files cannot be combined."""
    parser = argparse.ArgumentParser(prog="python -m moegate.bench.gate.trial", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--first", type=int, default=5, help="pairs of the first look")
    parser.add_argument("--again", type=int, default=3, help="pairs of the second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rates")
    options = parser.parse_args(arguments)
    try:
        trial = run_trial(
            [read(file) for file in options.files],
            tables=options.tables,
            first=options.first,
            again=options.again,
            seed=options.seed,
        )
    except (OSError, ValueError) as error:
        print(f"trial: {error}", file=sys.stderr)
        return 4
    print("\n".join(lines(trial)))
    if options.json is not None:
        write_json(options.json, asdict(trial))
    return 0


def read(file: Path) -> dict[str, Any]:
    """A self-test's file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none.
    """
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{file}: expected schema {SCHEMA}")
    return data


if __name__ == "__main__":
    sys.exit(main())
