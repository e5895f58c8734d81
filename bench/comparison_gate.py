"""The open ends of pytest-benchmark's comparison, closed for our benchmarks.

By itself `--benchmark-compare-fail` passes where a benchmark was removed or renamed, only warns of another machine,
stores the failing run as the next baseline before it fails, and fails by a traceback that JUnit files know nothing of.
(The fifth hole, benchmarks that xdist turns off, is closed in `plugin`.) Here a run is judged before it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

OURS = "moegate"
# What must agree before two times may be compared. Software may differ: its change may be what is measured.
_SAME_MACHINE = ("device", "l2_bytes")
FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """Something for which the run fails.

    Attributes:
        test: the benchmark's full name.
        why: in words.
    """

    test: str
    why: str


def unlike_machine(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Why times of two machines cannot be compared, in words; None where they can.

    Args:
        ours: this run's `machine_info`.
        theirs: the baseline's.
    """
    here, there = ours.get(OURS), theirs.get(OURS)
    if not isinstance(here, Mapping) or not isinstance(there, Mapping):
        return "the baseline does not say on which device it was measured"
    names = list(_SAME_MACHINE)
    if here.get("device") == "cpu":
        names.append("host")
    differs = [
        f"{name} {there.get(name)!r}, here {here.get(name)!r}" for name in names if here.get(name) != there.get(name)
    ]
    if here.get("device") == "cpu" and ours.get("node") != theirs.get("node"):
        differs.append(f"node {theirs.get('node')!r}, here {ours.get('node')!r}")
    return f"the baseline was measured on another machine: {'; '.join(differs)}" if differs else None


def judge(session: Any, prefix: str) -> list[Finding]:
    """What fails of a finished run that is compared with a baseline; empty where nothing is compared.

    Args:
        session: pytest-benchmark's session, before it has stored or compared anything.
        prefix: of our benchmarks' full names.

    A removed benchmark counts where `--benchmark-compare-fail` is given.
    """
    if not session.compare_fail or not session.compared_mapping:
        return []
    run = {bench.fullname for bench in session.benchmarks if bench}
    findings = []
    for path, baseline in session.compared_mapping.items():
        gone = [name for name in baseline if name.startswith(prefix) and name not in run]
        findings += [Finding(name, f"it is in the baseline {Path(path).name}, and was not measured") for name in gone]
    before = list(session.performance_regressions)
    # Names in findings are those of the tests, whatever names the table shows.
    shown, session.name_format = session.name_format, lambda bench: bench["fullname"]
    try:
        list(session.prepare_benchmarks())
        findings += [Finding(name, str(why)) for name, why in session.performance_regressions]
    finally:
        session.name_format = shown
        session.performance_regressions = before
    return findings


def never_a_baseline(session: Any) -> None:
    """Store this run apart from those that a later one is compared with."""
    storage = session.storage
    if hasattr(storage, "default_machine_id"):
        storage.default_machine_id = f"{FAILED}-{session.machine_id}"


def as_failed_tests(config: pytest.Config, findings: list[Finding]) -> None:
    """Report findings as failed tests, so that the summary, JUnit files and every other reporter have them."""
    for finding in findings:
        nodeid = f"{finding.test[:-1]}-compared]" if finding.test.endswith("]") else f"{finding.test}-compared"
        file, _, name = nodeid.partition("::")
        report = pytest.TestReport(
            nodeid=nodeid,
            location=(file, None, name),
            keywords={},
            outcome="failed",
            longrepr=f"Performance has regressed: {finding.test}: {finding.why}",
            when="call",
            duration=0.0,
        )
        config.hook.pytest_runtest_logreport(report=report)
