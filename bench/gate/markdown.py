"""A gate's record as Markdown: for a pull request's comment, a job's summary, or a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from .record import Change, GateRecord, State, Verdict, WorkloadRecord

_MARK = {Verdict.SLOWER: "❌ ", Verdict.FASTER: "✅ ", Verdict.SAME: "", Verdict.UNCLEAR: "❔ "}
_TITLE = {
    "holds": "no regression",
    "regression": "regression",
    "inconclusive": "inconclusive",
    "nothing": "nothing was measured",
}


def markdown(record: GateRecord) -> str:
    """The whole record, readable without the tool."""
    parts = [f"## moegate gate: {_TITLE[record.verdict]}", _sides(record)]
    if record.why:
        parts.append("\n".join(f"- {_escaped(reason)}" for reason in record.why))
    timed = [row for row in record.workloads if row.state is State.TIMED]
    if timed:
        parts.append(_table(timed))
        counts = ", ".join(f"{sum(row.verdict is v for row in timed)} {v}" for v in Verdict)
        see = "" if record.can_see is None else f" This run can see {record.can_see:.1%} (median over workloads)."
        parts.append(f"{len(timed)} workloads: {counts}.{see}")
    rest = [row for row in record.workloads if row.state is not State.TIMED]
    if not record.clock:
        right = sum(row.state is State.UNTIMED for row in rest)
        parts.append(f"The clock was off: {right} workloads were verified on both sides, and paths compared.")
        rest = [row for row in rest if row.state is not State.UNTIMED]
    if rest:
        parts.append("### Not timed\n\n" + "\n".join(_line(row) for row in rest))
    changes = [*record.changes, *(change for row in record.workloads for change in row.changes)]
    if changes:
        parts.append("### Paths, launches, kernels\n\n" + "\n".join(_changes(changes)))
    if record.notes:
        parts.append("\n".join(f"> {_escaped(note)}" for note in record.notes))
    return "\n\n".join(parts) + "\n"


def _sides(record: GateRecord) -> str:
    def side(name: str, revision: str, commit: str, dirty: bool) -> str:
        known = f" ({commit[:12]}{', with changes' if dirty else ''})" if commit else ""
        return f"{name} `{revision}`{known}"

    base, head = record.base, record.head
    machine = record.machine
    software = ", ".join(f"{name} {machine[name]}" for name in ("driver", "torch", "triton") if machine.get(name))
    subject = "" if head.subject == "moegate" else f", subject `{head.subject}`"
    return (
        f"{side('base', base.revision, base.commit, base.dirty)}, "
        f"{side('head', head.revision, head.commit, head.dirty)}{subject}; {_escaped(record.device)}"
        f"{f' ({software})' if software else ''}; {record.seconds:.0f} s"
    )


def _table(rows: Iterable[WorkloadRecord]) -> str:
    lines = [
        "| model | M | routing | dtype | base, µs | head, µs | change | interval | verdict | can see | path |",
        "|---|--:|---|---|--:|--:|--:|--:|---|--:|---|",
    ]
    order = {Verdict.SLOWER: 0, Verdict.UNCLEAR: 1, Verdict.FASTER: 2, Verdict.SAME: 3}
    for row in sorted(rows, key=lambda row: order[row.verdict or Verdict.UNCLEAR]):
        if row.base_seconds is None or row.head_seconds is None or row.change is None or row.verdict is None:
            continue
        low, high, see = row.low or 0.0, row.high or 0.0, row.can_see or 0.0
        lines.append(
            f"| {_escaped(row.model)} | {row.num_tokens} | {row.routing} | {row.dtype} | {row.base_seconds * 1e6:.1f} "
            f"| {row.head_seconds * 1e6:.1f} | {row.change:+.2%} | {low:+.1%} to {high:+.1%} "
            f"| {_MARK[row.verdict]}{row.verdict} | {see:.1%} | {_path(row)} |"
        )
    return "\n".join(lines)


def _path(row: WorkloadRecord) -> str:
    """Launches a call and the path in a few words; both sides' where they differ."""
    base, head = (_few_words(paths) for paths in (row.base_paths, row.head_paths))
    return head if base == head else f"{base} → {head}"


def _few_words(paths: object) -> str:
    if not isinstance(paths, dict):
        return ""
    words = [str(paths[name]) for name in ("backend", "assignment") if paths.get(name)]
    launches = sum(dict(paths.get("launches") or {}).values())
    return ", ".join([*words, *([f"{launches} launches"] if launches else [])])


def _line(row: WorkloadRecord) -> str:
    return f"- `{row.workload}`: **{row.state}** {_escaped(row.why)}"


def _changes(changes: Iterable[Change]) -> Iterable[str]:
    for change in changes:
        mark = "accepted: " if change.accepted else "❌ " if change.fails else ""
        yield f"- {mark}{change.what} on `{change.where}`: `{change.base}` → `{change.head}`"


def _escaped(text: str) -> str:
    """Text that comes from elsewhere, without meaning for Markdown or HTML."""
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
