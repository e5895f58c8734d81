"""`pytest bench --moegate-gate-base REV`: the speed gate's verdicts as tests, one for each workload."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moegate.bench.gate.markdown import markdown
from moegate.bench.gate.measuring import Plan
from moegate.bench.gate.record import GateRecord, State, Verdict, write_json
from moegate.bench.gate.run import Request, run_gate
from moegate.bench.gate.sides import BadSidesError, SideError, choose_sides
from moegate.bench.plugin import DONE, selected_workloads, selection_words
from moegate.bench.selection import choose_device
from moegate.bench.workloads import Workload

RECORD = pytest.StashKey[GateRecord]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each workload that the options select."""
    if "workload" in metafunc.fixturenames:
        workloads = selected_workloads(metafunc.config)
        metafunc.parametrize("workload", workloads, ids=[workload.id for workload in workloads])


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Iterator[GateRecord]:
    """The one run of this session."""
    option = pytestconfig.getoption
    if RECORD not in pytestconfig.stash:
        try:
            sides = choose_sides(
                Path(__file__).parent, option("moegate_gate_base"), allow_dirty=option("moegate_gate_allow_dirty")
            )
            request = Request(
                selected_workloads(pytestconfig),
                str(choose_device(option("moegate_bench_device"))),
                Plan(minutes=option("moegate_gate_minutes")),
                selection=selection_words(pytestconfig),
            )
            pytestconfig.stash[RECORD] = run_gate(sides, request)
        except (BadSidesError, SideError) as error:
            pytest.exit(f"moegate gate: {error}", returncode=4 if isinstance(error, BadSidesError) else 3)
        if option("moegate_gate_json"):
            write_json(Path(option("moegate_gate_json")), pytestconfig.stash[RECORD].as_dict())
    yield pytestconfig.stash[RECORD]
    pytestconfig.stash[DONE] = pytestconfig.stash.get(DONE, 0) + 1


def test_workload_is_no_slower(workload: Workload, record: GateRecord) -> None:
    row = next(row for row in record.workloads if row.workload == workload.id)
    if row.state in (State.SKIPPED, State.NEW):
        pytest.skip(f"{row.state}: {row.why}")
    verdict = row.verdict or row.state
    if row.verdict not in (Verdict.SAME, Verdict.FASTER):
        pytest.fail(f"{verdict}: {row.why}", pytrace=False)


def test_nothing_else_is_worse(record: GateRecord) -> None:
    """Lost paths, launches, spills, and benchmarks that are gone."""
    if record.why and record.exit_code:
        pytest.fail(markdown(record), pytrace=False)
