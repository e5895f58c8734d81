"""The table that a run prints last."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .record import Record
from .session import Run


def assignment_of(record: Record) -> str:
    """How the timed call assigned pairs to blocks, or its backend where it has no assignment; "-" for a peer."""
    for fact in ("assignment", "backend"):
        values = record.path.get(fact)
        if values:
            return str(values[-1])
    return "-"


def run_table(run: Run) -> Table:
    """A row for each workload that was timed: ours, with each peer's time and ours over theirs beside it."""
    records = run.records
    by_workload: dict[str, list[Record]] = {}
    for record in records:
        by_workload.setdefault(record.workload, []).append(record)
    peers = list(dict.fromkeys(each.subject for group in by_workload.values() for each in group[1:]))
    failed = {(workload, subject) for workload, subject, _ in run.failures}

    table = Table()
    for name, style in (("model", {}), ("routing", {}), ("M", {"justify": "right"})):
        table.add_column(name, no_wrap=True, **style)
    numbers = ["us", "IQR", "floor us", "ratio", "TFLOP/s", "GB/s"]
    for peer in peers:
        numbers += [f"{peer} us", f"/{peer}"]
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("path", "cache", "verdict"):
        table.add_column(name, no_wrap=True)
    for workload, group in by_workload.items():
        ours, others = group[0], {record.subject: record for record in group[1:]}
        cells = [
            ours.model,
            ours.routing,
            str(ours.num_tokens),
            f"{ours.timing.median * 1e6:.2f}",
            f"{ours.timing.spread:.1%}",
            f"{ours.floor.seconds * 1e6:.2f}",
            f"{ours.ratio:.2f}",
            _three_digits(ours.operations_per_second / 1e12),
            _three_digits(ours.bytes_per_second / 1e9),
        ]
        for peer in peers:
            if peer in others:
                versus = ours.versus[peer]
                cells += [
                    f"{others[peer].timing.median * 1e6:.2f}",
                    f"{versus.median:.3f} ±{(versus.high - versus.low) / 2:.3f}",
                ]
            else:
                cells += ["failed" if (workload, peer) in failed else "-", "-"]
        method = "" if ours.method in ("cuda-graph", "host") else " (eager)"
        verdict = f"holds, {ours.verdict.budget_used:.0%} of budget"
        table.add_row(*cells, assignment_of(ours) + method, ours.cache_state, verdict)
    return table


def _three_digits(value: float) -> str:
    """At least three significant digits, never an exponent: a GPU's TFLOP/s and a CPU's share a column."""
    decimals = next((digits for digits, limit in ((0, 100), (1, 10), (2, 1), (3, 0.1)) if value >= limit), 4)
    return f"{value:.{decimals}f}"


def as_json(run: Run) -> dict[str, Any]:
    """A run as data: `{schema, records, failures: [{workload, subject, reason}], skipped: [{workload, reason}]}`."""
    return {
        "schema": "moegate-bench-run/1",
        "records": [record.as_dict() for record in run.records],
        "failures": [dict(zip(("workload", "subject", "reason"), row, strict=True)) for row in run.failures],
        "skipped": [dict(zip(("workload", "reason"), row, strict=True)) for row in run.skipped],
    }
