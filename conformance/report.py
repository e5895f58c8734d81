"""What a run judged, as a table for people and as JSON for machines (schema 1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .catalogue import PROPERTIES, pairs_due
from .judge import Ledger, Tally
from .selection import SELECTION
from .session import current_session

SCHEMA = 1


def _verdict(tally: Tally) -> str:
    return "violated" if tally.violated else "known" if tally.known else "holds"


def _pairs(ledger: Ledger) -> dict[str, Any]:
    """How many of the declared pairs of features were run, and how often each."""
    session = current_session()
    declared = sorted(pairs_due(session.subject, session.device))
    counts = {pair: ledger.pairs.get(pair, 0) for pair in declared}
    least = min(counts.values(), default=0)
    return {"declared": len(counts), "run": sum(n > 0 for n in counts.values()), "least": least, "counts": counts}


def as_json(ledger: Ledger, vacuous: list[str]) -> dict[str, Any]:
    """The report of `moegate check --json`."""
    session = current_session()
    violated = any(tally.violated for tally in ledger.tallies.values())
    rows = [
        {
            "id": id,
            "sentence": PROPERTIES[id].sentence,
            "cases": tally.cases,
            "violated": tally.violated,
            "known": tally.known,
            "budget_used": tally.budget_used,
            "verdict": _verdict(tally),
            "finding": tally.finding,
        }
        for id, tally in sorted(ledger.tallies.items())
    ]
    return {
        "schema": SCHEMA,
        "verdict": "violated" if violated else "nothing judged" if vacuous else "holds",
        "subject": session.subject.name,
        "device": session.device,
        "profile": SELECTION.profile,
        "executions": sum(ledger.executions.values()),
        "executions_by_variant": dict(sorted(ledger.executions.items())),
        "value_cases": sum(row["cases"] for row in rows if row["id"] == "NUM-01" or row["id"].startswith("META-")),
        "properties": rows,
        "feature_pairs": _pairs(ledger),
        "numerics": vars(session.subject.numerics),
        "deviations": session.subject.deviations,
        "not_judged": vacuous,
        "skipped": dict(ledger.skipped),
        "kernels": ledger.kernel_variants(),
        "facts": dict(ledger.facts),
    }


def as_lines(ledger: Ledger) -> Iterator[str]:
    """The table in plain text."""
    report = as_json(ledger, [])
    by_variant = ", ".join(f"{n} {variant}" for variant, n in report["executions_by_variant"].items())
    yield f"{report['subject']} on {report['device']}: {report['executions']} executions ({by_variant})"
    for row in report["properties"]:
        used = "     -" if row["budget_used"] is None else f"{row['budget_used']:6.2f}"
        yield f"{row['id']:<11} {row['cases']:>6} cases  budget used {used}  {row['verdict']:<9} {row['sentence']}"
    yield f"cases whose numbers were judged against a budget or another call: {report['value_cases']}"
    pairs = report["feature_pairs"]
    yield f"feature pairs run: {pairs['run']} of {pairs['declared']} declared, each at least {pairs['least']} times"
    yield f"numerics judged by: {', '.join(f'{k}={v}' for k, v in report['numerics'].items())}"
    for reason, count in report["skipped"].items():
        yield f"skipped ({count}): {reason}"
    if report["kernels"]:
        variants = ", ".join(f"{count} {name}" for name, count in report["kernels"].items())
        yield f"kernel variants: {sum(report['kernels'].values())} ({variants})"
    for fact, count in report["facts"].items():
        yield f"{fact}: {count}"
