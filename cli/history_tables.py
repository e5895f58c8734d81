"""The tables of `moegate history`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from moegate.bench.history.answers import Comparison, Listed


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")  # pyright: ignore[reportArgumentType]
    return table


def runs_table(runs: list[Listed]) -> Table:
    """A row for each run."""
    table = _table(*((name, "left") for name in ("run", "time", "commit", "branch", "device")), ("times", "right"))
    table.add_column("outcome")
    for run in runs:
        commit = (run.commit[:12] or "-") + (" (dirty)" if run.dirty else "")
        outcome = Text(run.outcome, style={"passed": "green", "failed": "red"}.get(run.outcome, "yellow"))
        outcome.append(f", {run.failures} not timed" if run.failures else "", style="red")
        outcome.append(", promoted" if run.promoted else "", style="bold")
        table.add_row(
            run.id, run.time[:19], commit, Text(run.branch or "-"), Text(run.device), str(run.points), outcome
        )
    return table


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Two runs, a row for each time that both have, and a line for each that only one has."""
    before, after = comparison.before, comparison.after
    for name, run in (("before", before), ("after", after)):
        console.print(
            f"{name}: run {run.id} of {run.time}, commit {run.commit[:12] or '-'}{' (dirty)' if run.dirty else ''}, "
            f"{run.outcome}, {run.device}, driver {run.driver or '-'}, torch {run.torch}, triton {run.triton}",
            markup=False,
            soft_wrap=True,
        )
    table = _table(
        ("workload", "left"), ("subject", "left"), ("before us", "right"), ("after us", "right"), ("change", "right")
    )
    for row in comparison.rows:
        table.add_row(
            Text(row.key.workload),
            Text(row.key.subject),
            f"{row.before * 1e6:.2f}",
            f"{row.after * 1e6:.2f}",
            _change_text(row.change),
        )
    if comparison.rows:
        console.print(table)
    for workload, subject, run, why in comparison.unmatched:
        console.print(f"not compared: {workload}, {subject}, of run {run}: {why}", markup=False, soft_wrap=True)


def _change_text(change: float) -> Text:
    return Text(f"{change:+.1%}", style="red" if change > 0.01 else "green" if change < -0.01 else "")


def changes_table(rows: list[dict[str, Any]]) -> Table:
    """A row for each change point."""
    table = _table(
        ("workload", "left"), ("device", "left"), ("subject", "left"), ("from..to", "left"), ("before us", "right"),
        ("after us", "right"), ("change", "right"), ("p", "right"), ("changed at the same time", "left"),
    )  # fmt: skip
    for row in rows:
        key = row["key"]
        table.add_row(
            Text(key["workload"]),
            Text(key["device"]),
            Text(key["subject"]),
            f"{row['last_commit'][:10] or '-'}..{row['first_commit'][:10] or '-'}",
            f"{row['before'] * 1e6:.2f}",
            f"{row['after'] * 1e6:.2f}",
            _change_text(row["change"]),
            f"{row['p_value']:.1g}",
            Text("; ".join(row["also_changed"]) or "-"),
        )
    return table


def range_table(rows: list[dict[str, Any]]) -> Table:
    """A row for each series of a range of runs."""
    table = _table(
        ("workload", "left"), ("subject", "left"), *((name, "right") for name in ("commits", "first us", "last us")),
        ("low us", "right"), ("high us", "right"), ("change", "right"),
    )  # fmt: skip
    for row in rows:
        times = [f"{row[name] * 1e6:.2f}" for name in ("first", "last", "low", "high")]
        key = row["key"]
        table.add_row(
            Text(key["workload"]), Text(key["subject"]), str(row["commits"]), *times, _change_text(row["change"])
        )
    return table
