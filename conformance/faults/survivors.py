"""What a sample of mutants came to, and what is known of each that survived, kept beside the catalogue.

    moegate faults --mutate 300 --seed 0 --json run.json
    python -m moegate.conformance.faults.survivors run.json --count 300 --seed 0

writes `mutants.json`: the counts of that run, and a row for each survivor. Verdicts that are there stay with their
mutant, by its edit, wherever the lines have moved; one that is new is open, until somebody has looked at it. Those of
mutants outside of the sample are kept apart, as long as the source still has what they edit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .fault import Fault

MUTANTS = Path(__file__).parent / "mutants.json"
SCHEMA = 1
VERDICTS = {
    "equivalent": "nobody can tell it from the original, and it is hunted no more",
    "later": "the suite kills it since, by what was added",
    "elsewhere": "tests that are not part of the suite kill it",
    "unjudged": "it changes what the suite is right not to judge, such as the words of a message",
    "open": "nothing kills it",
}


def mark_of(mutant: Fault) -> str:
    """Of the edit alone: the lines that it changes and what they become."""
    return hashlib.sha256(repr(mutant.edits).encode()).hexdigest()[:16]


def read_survivors(path: Path = MUTANTS) -> dict[str, dict[str, str]]:
    """The rows of survivors by their marks; empty where no run is checked in.

    Raises:
        ValueError: a file of another form, or a verdict that is none.
    """
    if not path.exists():
        return {}
    data = json.loads(path.read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {data.get('schema')!r}")
    rows = [*data["survivors"], *data.get("others", ())]
    for row in rows:
        if row["verdict"] not in VERDICTS:
            raise ValueError(f"{path}: {row['id']}: expected a verdict of {sorted(VERDICTS)}, got {row['verdict']!r}")
    return {row["mark"]: row for row in rows}


def without_equivalents(mutants: Sequence[Fault], path: Path = MUTANTS) -> list[Fault]:
    """The mutants, with the reason at those that are known to change nothing."""
    known = read_survivors(path)
    equivalent = {mark: row["why"] for mark, row in known.items() if row["verdict"] == "equivalent"}
    return [replace(mutant, equivalent=equivalent.get(mark_of(mutant), "")) for mutant in mutants]


def summary(
    report: dict[str, Any],
    mutants: Sequence[Fault],
    count: int,
    seed: int,
    path: Path = MUTANTS,
    every: Sequence[Fault] = (),
) -> dict[str, Any]:
    """The contents of `mutants.json`.

    Args:
        report: of `moegate faults --mutate COUNT --seed SEED --json`.
        mutants: that sample, of the same source.
        count: of the sample.
        seed: of the sample.
        path: of the verdicts that are there.
        every: mutant of the source, of which those outside the sample keep their verdicts.

    Raises:
        ValueError: a report of other mutants.
    """
    outcomes = {row["id"]: row for row in report["faults"]}
    not_hunted = {row["id"] for row in report["not_hunted"]}
    if set(outcomes) | not_hunted != {mutant.id for mutant in mutants}:
        raise ValueError(f"report: expected the {len(mutants)} mutants of count {count} and seed {seed}, got others")
    known = read_survivors(path)
    areas: dict[str, list[int]] = {}
    survivors = []
    for mutant in mutants:
        outcome, mark = outcomes.get(mutant.id), mark_of(mutant)
        is_killed = outcome is not None and outcome["killed"]
        tally = areas.setdefault(mutant.area, [0, 0])
        tally[0] += 1
        tally[1] += is_killed
        row = known.get(mark, {"verdict": "open", "why": ""})
        if not is_killed or row["verdict"] != "open":
            own = {"id": mutant.id, "mark": mark, "change": mutant.note}
            survivors.append(own | {name: row[name] for name in ("verdict", "why")})
    sampled = {mark_of(mutant) for mutant in mutants}
    others = [
        {**known[mark], "id": mutant.id}
        for mutant in every
        if (mark := mark_of(mutant)) in known and mark not in sampled
    ]
    by = [row["by"] for row in outcomes.values() if row["killed"]]
    return {
        "schema": SCHEMA,
        "count": count,
        "seed": seed,
        "mutants": len(mutants),
        "killed": len(by),
        "by_error": sum(not any("-" in id and ":" not in id for id in ids) for ids in by),
        "areas": areas,
        "survivors": survivors,
        "others": others,
    }


def main() -> None:
    """Write `mutants.json` from a run's report."""
    from .mutants import candidates, sample

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    mutants = sample(arguments.count, arguments.seed)
    report = json.loads(arguments.report.read_text())
    found = summary(report, mutants, arguments.count, arguments.seed, every=candidates())
    lists = []
    for name in ("survivors", "others"):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in found.pop(name))
        lists.append(f'"{name}": [\n{rows}\n]')
    head = json.dumps(found)[:-1]
    MUTANTS.write_text(", ".join([head, *lists]) + "}\n")


if __name__ == "__main__":
    main()
