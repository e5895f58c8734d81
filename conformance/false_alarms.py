"""False alarms on honest subjects: `python -m moegate.conformance.false_alarms REPORT.json ...` as Markdown.

The reports are those of `moegate check --json` on implementations that are held to be right; whatever is violated in
them is a false alarm, or a fault of the implementation that somebody has to look at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import beta

from .report import SCHEMA

LEVEL = 0.95
HEADER = """# False alarms: what the suite says of implementations that are held to be right

Written by `python -m moegate.conformance.false_alarms REPORT.json ... > docs/false-alarms.md` from reports that
`moegate check --subject NAME --profile nightly|soak|gate --json REPORT.json` wrote. Nightly and soak draw new cases
each time; none is one that the limits were fitted on ([calibration.md](calibration.md)). An alarm is a case that
violated a property; its chance is bounded by Clopper and Pearson's one-sided 95 % bound.
"""


def upper_bound(alarms: int, cases: int) -> float:
    """Clopper and Pearson's one-sided 95 % bound of the chance of an alarm on a case."""
    return 1.0 if alarms >= cases else float(beta.ppf(LEVEL, alarms + 1, cases - alarms))


def as_markdown(reports: Sequence[dict[str, Any]]) -> str:
    """The runs, and for each property the cases, the alarms with their bound, and the median of the budget used.

    Raises:
        ValueError: a report of another schema, or none.
    """
    if not reports:
        raise ValueError("reports: expected one or more, got none")
    for report in reports:
        if report.get("schema") != SCHEMA:
            raise ValueError(f"reports: expected schema {SCHEMA}, got {report.get('schema')!r}")
    lines = [
        *HEADER.splitlines(),
        "",
        "| subject | device | profile | executions | cases of values | verdict |",
        "|---|---|---|--:|--:|---|",
    ]
    for report in reports:
        counts = f"{report['executions']:,} | {report['value_cases']:,}"
        lines.append(
            f"| {report['subject']} | {report['device']} | {report['profile']} | {counts} | {report['verdict']} |"
        )
    lines += [
        "",
        "| property | cases | alarms | at most (95 %) | median budget used | known failures |",
        "|---|--:|--:|--:|---|--:|",
    ]
    rows = [row for report in reports for row in report["properties"]]
    for id in sorted({row["id"] for row in rows}):
        mine = [row for row in rows if row["id"] == id]
        cases, alarms, known = (sum(row[name] for row in mine) for name in ("cases", "violated", "known"))
        medians = [row["budget_used_median"] for row in mine if row["budget_used_median"] is not None]
        spread = "-" if not medians else f"{min(medians):.2f} to {max(medians):.2f}"
        lines.append(f"| {id} | {cases:,} | {alarms} | {upper_bound(alarms, cases):.2g} | {spread} | {known or ''} |")
    values = sum(report["value_cases"] for report in reports)
    judged = ("NUM", "META")
    off = sum(row["violated"] for row in rows if row["id"].split("-")[0] in judged)
    lines += ["", f"{off} alarms in {values:,} cases of values: at most {upper_bound(off, values):.2g} a case (95 %)."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown([json.loads(Path(name).read_text()) for name in sys.argv[1:]]), end="")
