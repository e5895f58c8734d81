"""What a run judged, as plain data (schema 2): `report.schema.json` describes it, `report_formats.py` writes it."""

from __future__ import annotations

from typing import Any

from .catalogue import PROPERTIES, pairs_due
from .judge import Ledger, Tally
from .selection import SELECTION
from .session import current_session

SCHEMA = 2


def _verdict(tally: Tally) -> str:
    return "violated" if tally.violated else "known" if tally.known else "holds"


def _pairs(ledger: Ledger) -> dict[str, Any]:
    """How many of the declared pairs of features were run, and how often each."""
    session = current_session()
    declared = sorted(pairs_due(session.subject, session.device))
    counts = {pair: ledger.pairs.get(pair, 0) for pair in declared}
    least = min(counts.values(), default=0)
    return {"declared": len(counts), "run": sum(n > 0 for n in counts.values()), "least": least, "counts": counts}


def _property(id: str, tally: Tally) -> dict[str, Any]:
    return {
        "id": id,
        "sentence": PROPERTIES[id].sentence,
        "cases": tally.cases,
        "violated": tally.violated,
        "known": tally.known,
        "budget_used": _number(tally.budget_used),
        "budget_used_median": tally.median_used(),
        "verdict": _verdict(tally),
        "finding": tally.finding,
        "spec": tally.spec or None,
        "replay": tally.replay or None,
        "evidence": tally.evidence,
    }


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or value - value == 0 else str(value)


def stale_entries(ledger: Ledger) -> list[str]:
    """Known failures that pass now: each is to be taken out of its file."""
    rows = current_session().known.report(ledger.known)
    return [
        f"{row['property']} of {row['issue']} passes now on all {row['cases']} cases that it names: take the entry out"
        for row in rows
        if row["state"] == "passes now"
    ]


def as_json(ledger: Ledger, vacuous: list[str], stale: list[str]) -> dict[str, Any]:
    """The report of a run.

    Args:
        ledger: of all workers.
        vacuous: why it proves too little.
        stale: known failures for which it fails.
    """
    session = current_session()
    violated = any(tally.violated for tally in ledger.tallies.values())
    rows = [_property(id, tally) for id, tally in sorted(ledger.tallies.items())]
    kinds = (
        (violated, "violated"),
        (ledger.errors, "errors"),
        (ledger.inconclusive, "inconclusive"),
        (vacuous, "nothing judged"),
        (stale, "stale known failures"),
    )
    verdict = next((name for found, name in kinds if found), "holds")
    return {
        "schema": SCHEMA,
        "verdict": verdict,
        "subject": session.subject.name,
        "last_run": session.subject.last_run,
        "device": session.device,
        "profile": SELECTION.profile,
        "executions": sum(ledger.executions.values()),
        "executions_by_variant": dict(sorted(ledger.executions.items())),
        "value_cases": sum(row["cases"] for row in rows if row["id"] == "NUM-01" or row["id"].startswith("META-")),
        "properties": rows,
        "feature_pairs": _pairs(ledger),
        "numerics": vars(session.subject.numerics),
        "deviations": dict(session.subject.deviations),
        "not_judged": vacuous,
        "stale": stale,
        "errors": [f"{reason} ({count} times)" for reason, count in ledger.errors.items()],
        "inconclusive": [f"{reason} ({count} times)" for reason, count in ledger.inconclusive.items()],
        "known_failures": session.known.report(ledger.known),
        "skipped": dict(ledger.skipped),
        "kernels": ledger.kernel_variants(),
        "facts": dict(ledger.facts),
    }
