"""What a table amounts to: one verdict, an exit code, and a line for each reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .record import Change, State, Verdict, WorkloadRecord

HOLDS, FINDING, INCONCLUSIVE, NOTHING, BAD_ARGUMENTS = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        verdict: "holds", "regression", "inconclusive" or "nothing".
        exit_code: 0, 1, 2 or 3.
        why: a line for each reason, the worst first.
    """

    verdict: str
    exit_code: int
    why: tuple[str, ...]


def decide(
    table: Sequence[WorkloadRecord],
    changes: Sequence[Change],
    *,
    clock: bool,
    refused: str | None = None,
    accept: Sequence[str] = (),
) -> Outcome:
    """Findings first, then what nobody knows.

    `accept` takes changes, and a missing workload (`missing`, `missing:PATTERN`); nothing makes a wrong head right.

    A path, a launch or a spill that got worse is a finding unless it was accepted, or the clock found its workload the
    same or faster: then the time has spoken, and it is printed. So are a wrong head, and a workload that is gone.
    """
    findings, open_questions = [], []
    for row in table:
        accepted = row.state is State.MISSING and any(
            fnmatchcase(f"missing:{row.workload}", pattern) or pattern == "missing" for pattern in accept
        )
        if row.verdict is Verdict.SLOWER:
            findings.append(f"{row.workload}: {row.why}")
        if row.state in (State.WRONG, State.MISSING) and not accepted:
            findings.append(f"{row.workload}: {row.state}: {row.why}")
        elif row.state is State.BASE_WRONG:
            open_questions.append(f"{row.workload}: {row.why}")
        if clock and (row.verdict is Verdict.UNCLEAR or row.state is State.UNTIMED):
            open_questions.append(f"{row.workload}: {row.verdict or row.state}: {row.why}")
        if row.verdict not in (Verdict.SAME, Verdict.FASTER):
            findings += [_words(change) for change in row.changes if change.fails and not change.accepted]
    findings += [_words(change) for change in changes if change.fails and not change.accepted]
    if refused:
        open_questions.insert(0, refused)
    if findings:
        return Outcome("regression", FINDING, (*findings, *open_questions))
    could = [row for row in table if row.state in (State.TIMED, State.UNTIMED)]
    if not could or (clock and not any(row.state is State.TIMED for row in could)):
        reasons = [f"{row.workload}: {row.state}: {row.why}" for row in table]
        return Outcome("nothing", NOTHING, tuple(reasons or ["no workload was selected"]))
    if open_questions:
        return Outcome("inconclusive", INCONCLUSIVE, tuple(open_questions))
    return Outcome("holds", HOLDS, ())


def _words(change: Change) -> str:
    return f"{change.what} changed on {change.where}: {change.base} -> {change.head}"
