"""Which runs may be a baseline: those of a clean commit on the main branch that passed, and no others."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .provenance import GitError, on_main, origin
from .run import outcome_of


class PromotionRefusedError(ValueError):
    """A run that may not be a baseline, with the reason."""


def judge(repository: Path, main: str, *, commit: str, dirty: bool, exit_code: int | None) -> dict[str, Any]:
    """What a promotion's file says, for a run that may be promoted.

    Args:
        repository: a checkout whose history holds the main branch.
        main: the main branch's name.
        commit: the run's.
        dirty: whether files differed from it.
        exit_code: how the run ended; None where nobody said.

    Raises:
        PromotionRefusedError: it may not, and why.
    """
    outcome = outcome_of(exit_code)
    if outcome == "failed":
        raise PromotionRefusedError(f"the run failed (exit code {exit_code})")
    if outcome == "unknown":
        raise PromotionRefusedError("nobody said how the run ended (`moegate history add --exit-code`)")
    if not commit:
        raise PromotionRefusedError("the run's commit is not known")
    if dirty:
        raise PromotionRefusedError(f"files differed from commit {commit[:12]} when it ran")
    try:
        found = on_main(repository, commit, main)
    except GitError as error:
        raise PromotionRefusedError(str(error)) from None
    return {
        "commit": commit,
        "main": found.ref,
        "main_tip": found.tip,
        "promoted_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "origin": origin(),
    }
