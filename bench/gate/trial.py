"""`python -m moegate.bench.gate.trial FILE ...`: the gate's error rates, from the files of several self-tests.

A table of the gate is some pairs of processes and some more for what is suspect. From all pairs that were measured,
tables are put together at random, a pair with all its workloads together, so that what a pair's processes share stays
shared. Each table is judged as a real run is, both looks. Tables have pairs in common, so they are not independent: the
bounds are those of as many independent tables, and the number of pairs is printed beside them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from .record import Verdict, write_json
from .selftest import SCHEMA, complete
from .table import evidence_of
from .verdict import Evidence, Rule, is_open, judge, table_can_see

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
        """The rate with its bounds."""
        low = float(stats.beta.ppf(1 - _CONFIDENCE, count, of - count + 1)) if count else 0.0
        high = float(stats.beta.ppf(_CONFIDENCE, count + 1, of - count)) if count < of else 1.0
        return Rate(count, of, low, high)

    def __str__(self) -> str:
        return f"{self.count} of {self.of} ({self.count / self.of:.2%}; 95 % bounds {self.low:.2%} and {self.high:.2%})"


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
        reached: by level, the median slow-down that was really injected.
        wrong: tables with injected slow-downs in which a workload without one was flagged.
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
    reached: Mapping[str, float]
    wrong: Rate


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
    levels = [str(level) for level in files[0]["levels"]]
    draw = random.Random(seed)
    slower = flagged = unclear = wrong = 0
    seen: list[float] = []
    found = {level: [0, 0] for level in levels}
    for _ in range(tables):
        pairs = draw.sample(rows, first + again)
        verdicts, can_see = _judged(pairs, dict.fromkeys(names, ""), first)
        seen.append(can_see)
        slower += Verdict.SLOWER in verdicts.values()
        flagged += any(verdict in (Verdict.SLOWER, Verdict.FASTER) for verdict in verdicts.values())
        unclear += sum(verdict is Verdict.UNCLEAR for verdict in verdicts.values())
        if not levels:
            continue
        slowed = draw.sample(names, max(len(levels), round(_INJECTED_SHARE * len(names))) if len(names) > 8 else 1)
        injected = dict.fromkeys(names, "") | {name: draw.choice(levels) for name in slowed}
        verdicts, _ = _judged(pairs, injected, first)
        for name in slowed:
            found[injected[name]][0] += verdicts[name] is Verdict.SLOWER
            found[injected[name]][1] += 1
        wrong += any(verdicts[name] in (Verdict.SLOWER, Verdict.FASTER) for name in names if name not in slowed)
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
        spread=statistics.median(_spread([row[name] for row in rows]) for name in names),
        found={level: Rate.of_counts(*counts) for level, counts in found.items() if counts[1]},
        reached={
            level: statistics.median(row[name]["reached"][level] for row in rows for name in names) for level in levels
        },
        wrong=Rate.of_counts(wrong, tables),
    )


def _cell(cell: Mapping[str, Any], level: str) -> dict[str, Any]:
    return {**cell, "head": cell["injected"][level]} if level else dict(cell)


def _spread(cells: Sequence[Mapping[str, Any]]) -> float:
    evidence = evidence_of(cells, len(cells))
    return statistics.stdev(evidence.effects) if evidence else 0.0


def _judged(
    pairs: Sequence[Mapping[str, Mapping[str, Any]]], levels: Mapping[str, str], first: int
) -> tuple[dict[str, Verdict], float]:
    """The verdicts of one run: a look at the first pairs, and one with all of them at what was unclear."""
    cells = {name: [_cell(pair[name], level) for pair in pairs] for name, level in levels.items()}

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
        f"{trial.tables} tables of {trial.first} pairs (and {trial.again} more for what was unclear), put together at "
        "random, a pair's workloads together",
        f"A/A tables with a false alarm (SLOWER): {trial.slower}",
        f"A/A tables with anything flagged (SLOWER or FASTER): {trial.flagged}",
        f"A/A verdicts that were UNCLEAR: {trial.unclear:.2%}",
        f"spread of pairs: {trial.spread:.2%} (median over workloads); can see {trial.can_see:.2%}",
        *(
            f"injected {float(level):.0%} (reached {trial.reached[level]:.2%}): flagged {rate}"
            for level, rate in trial.found.items()
        ),
        f"tables with injected slow-downs in which another workload was flagged: {trial.wrong}",
    ]


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
