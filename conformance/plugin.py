"""The pytest plugin: options, markers, one worker a GPU, and the run's table.

It loads in every pytest run of its environment, so it imports neither torch, Triton nor Hypothesis until a test of the
suite is collected, and registers no Hypothesis profile for others' tests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from .selection import PROFILES, SELECTION

if TYPE_CHECKING:
    from .judge import Ledger

# Of each worker, by its name: what it has judged so far, or in all.
_ledgers: dict[str, Any] = {}
_collected: list[str] = []
# Tests that ended their worker's process, and so never report.
_crashed: list[str] = []
_notes: list[str] = []
# Why nothing can be run, each with pytest's exit code for it.
_refusals: list[tuple[int, str]] = []
# A package is not there: nothing can be judged here, though nobody asked for anything wrong.
_NOTHING_HERE = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    """The `--moegate-*` options."""
    group = parser.getgroup("moegate", "conformance of Mixture-of-Experts layers")
    group.addoption("--moegate-subject", default="moegate", help="implementation under test: a name, or FILE.py:CLASS")
    group.addoption("--moegate-device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    group.addoption("--moegate-profile", choices=PROFILES, default="gate", help="how cases are drawn (default: gate)")
    group.addoption("--moegate-scale", type=float, default=1.0, help="multiplies the number of cases")
    group.addoption("--moegate-minutes", type=float, metavar="N", help="soak for so long, over all workers")
    group.addoption("--moegate-reruns", type=_count, metavar="N", help="only call fixed cases N times more each")
    group.addoption("--moegate-spec", metavar="LINE", help="run this one spec, as a failure printed it")
    group.addoption("--moegate-isolate", action="store_true", help="run the subject in a process of its own")
    group.addoption("--moegate-timeout", type=float, default=120.0, metavar="S", help="seconds for a call there")
    group.addoption("--moegate-python", metavar="FILE", help="the Python of that process (default: this one)")
    group.addoption("--moegate-known", metavar="FILE", help="known failures beside those that ship (TOML)")
    group.addoption(
        "--moegate-report",
        metavar="FILE",
        action="append",
        default=[],
        help="write what was judged: as JUnit (.xml), Markdown (.md) or JSON; may be given several times",
    )
    group.addoption("--moegate-emit-repro", metavar="FILE.py", help="write a finding as a script without moegate")
    group.addoption("--moegate-progress", metavar="FILE", help="append one byte to FILE for each execution")


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return count


def pytest_configure(config: pytest.Config) -> None:
    """Set the selection from the options."""
    config.addinivalue_line("markers", "moegate_facets(*names): facets of the subject that the test needs")
    config.addinivalue_line("markers", "moegate_executions(examples, runs): what the test will run, for the progress")
    config.addinivalue_line("markers", "moegate_reruns(cases): calls so many fixed cases again and again")
    config.addinivalue_line("markers", "moegate_ranks: starts ranks as processes, on GPUs one for each that is there")
    names = (
        "subject",
        "device",
        "profile",
        "scale",
        "spec",
        "progress",
        "known",
        "minutes",
        "reruns",
        "isolate",
        "timeout",
        "python",
    )
    for name in names:
        setattr(SELECTION, name, config.getoption(f"moegate_{name}"))
    SELECTION.isolate = SELECTION.isolate or SELECTION.python is not None


@pytest.fixture(scope="session")
def moegate_session() -> Any:
    """This process's session: subject, device and ledger."""
    from .session import current_session

    return current_session()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a variant of the subject; a facet that is not there is a skip with that reason."""
    if "moegate_variant" not in metafunc.fixturenames:
        return
    from .loading import NotInstalledError
    from .session import current_session

    try:
        session = current_session()
    except NotInstalledError as error:
        _refusals.append((_NOTHING_HERE, f"moegate: {error}"))
        metafunc.parametrize("moegate_variant", [])
        return
    except (ValueError, ImportError) as error:
        _refusals.append((int(pytest.ExitCode.USAGE_ERROR), f"moegate: {error}"))
        metafunc.parametrize("moegate_variant", [])
        return
    needed = _needed(metafunc.definition)
    cases = []
    for variant in session.subject.variants:
        reason = session.subject.unavailable(variant, session.device)
        missing = [facet for facet in needed if facet not in session.subject.facets(variant)]
        if reason is None and missing:
            reason = f"{session.subject.name} ({variant}) does not define {', '.join(missing)}"
        marks = () if reason is None else pytest.mark.skip(reason=reason)
        cases.append(pytest.param(variant, marks=marks, id=variant))
    metafunc.parametrize("moegate_variant", cases)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remember whether the suite itself is being run; a replay keeps only the tests that take its kind of spec."""
    mine = [item for item in items if item.get_closest_marker("moegate_facets")]
    spec = _spec_to_replay() if mine else None
    if _refusals:
        _refuse(config, items)
        return
    if SELECTION.reruns is not None:
        others = [item for item in items if not item.get_closest_marker("moegate_reruns")]
        config.hook.pytest_deselected(items=others)
        items[:] = mine = [item for item in mine if item not in others]
    _collected.extend(item.nodeid for item in mine)
    if spec is None:
        _share_time(config, mine)
        _announce(config, mine)
        return
    takes = [item for item in mine if spec.facet in _needed(item) and _fits(item, spec)]
    config.hook.pytest_deselected(items=[item for item in items if item not in takes])
    items[:] = takes


def _needed(item: pytest.Item) -> tuple[str, ...]:
    marker = item.get_closest_marker("moegate_facets")
    return marker.args if marker else ()


def _spec_to_replay() -> Any:
    if SELECTION.spec is None:
        return None
    from .spec import parse_spec

    try:
        return parse_spec(SELECTION.spec)
    except ValueError as error:
        _refusals.append((int(pytest.ExitCode.USAGE_ERROR), f"--moegate-spec: {error}"))
    return None


def _refuse(config: pytest.Config, items: list[pytest.Item]) -> None:
    """End the run; a worker runs nothing, and lets its controller say it."""
    if not hasattr(config, "workeroutput"):
        _give_up(*_refusals[0])
    config.workeroutput["moegate_refusal"] = list(_refusals[0])
    items.clear()


def _give_up(code: int, message: str) -> NoReturn:
    if code == pytest.ExitCode.USAGE_ERROR:
        raise pytest.UsageError(message)
    pytest.exit(message, returncode=code)


def _fits(item: Any, spec: Any) -> bool:
    """Whether a test's parameters (its dtype, say) are those of the spec, where the spec has a field of that name."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return all(getattr(spec, name, value) == value for name, value in parameters.items())


def _share_time(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say how long a soak's tests have together; each takes an equal part of what is left when it begins."""
    if SELECTION.minutes is None:
        return
    drawing = [item for item in items if item.get_closest_marker("moegate_executions")]
    count = sum(item.get_closest_marker("skip") is None for item in drawing)
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    SELECTION.until = time.monotonic() + SELECTION.minutes * 60
    SELECTION.waiting = -(-count // workers)


def _announce(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say how many executions are to come, beside the file that counts them; with xdist the first worker does."""
    if (
        SELECTION.progress is None
        or SELECTION.minutes is not None
        or getattr(config, "workerinput", {}).get("workerid", "gw0") != "gw0"
    ):
        return
    from .reruns import reruns_asked
    from .session import current_session

    total = 0
    for item in items:
        if item.get_closest_marker("skip") is not None:
            continue
        marker, again = (item.get_closest_marker(f"moegate_{name}") for name in ("executions", "reruns"))
        if marker is not None:
            total += current_session().examples(marker.args[0]) * marker.args[1]
        if again is not None:
            total += (again.args[0] if SELECTION.reruns is not None else 1) * (1 + reruns_asked())
    Path(SELECTION.progress).with_suffix(".total").write_text(str(total))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep why a test failed without a finding; with its last report a worker sends what it has judged so far.

    It may not live to its end.
    """
    report = yield
    if report.failed and call.excinfo is not None and item.nodeid in _collected:
        from .session import current_session

        current_session().ledger.failed(item.nodeid, call.excinfo.value)
    if call.when == "teardown" and _collected:
        from .session import current_session

        session = current_session()
        session.release_memory()
        if hasattr(item.config, "workeroutput"):
            report.moegate_ledger = session.ledger.as_dict()
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what a worker sends with a report."""
    if hasattr(report, "moegate_ledger") and hasattr(report, "node"):
        _ledgers[report.node.gateway.id] = report.moegate_ledger


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str) -> None:
    """Keep the test in which a worker died: nobody else says so."""
    _crashed.append(crashitem)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A worker hands its ledger over; the controller refuses to call a run green that judged nothing."""
    ledger = _own_ledger()
    config = session.config
    if hasattr(config, "workeroutput"):
        if ledger is not None:
            config.workeroutput["moegate_ledger"] = ledger.as_dict()
        return
    merged = _merged(ledger)
    if merged is None:
        return
    report = _report(config, merged)
    if exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED) and (report["not_judged"] or report["stale"]):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if report["verdict"] == "inconclusive":
        session.exitstatus = pytest.ExitCode.INTERRUPTED
    from .report_formats import write_report

    for path in config.getoption("moegate_report") or ():
        write_report(report, path)
    if config.getoption("moegate_emit_repro"):
        from .repro import emit_repro
        from .session import current_session

        _notes.append(emit_repro(current_session(), report["properties"], config.getoption("moegate_emit_repro")))


def _own_ledger() -> Ledger | None:
    if not _collected:
        return None
    from .session import current_session

    return current_session().ledger


def _merged(own: Ledger | None) -> Ledger | None:
    from_workers = [ledger for ledger in _ledgers.values() if ledger]
    if own is None and not from_workers:
        return None
    from .judge import Ledger

    merged = Ledger()
    for ledger in from_workers:
        merged.merge(Ledger.from_dict(ledger))
    if own is not None:
        merged.merge(own)
    merged.errors.update(f"{test} ended its worker's process" for test in _crashed)
    return merged


def _is_partial(config: pytest.Config) -> bool:
    """Whether somebody chose a part of the suite, which then owes no completeness."""
    chosen = config.option.keyword or config.option.markexpr or any(".py" in str(arg) for arg in config.args)
    part = (SELECTION.spec, SELECTION.minutes, SELECTION.reruns)
    return bool(chosen or any(option is not None for option in part) or SELECTION.scale < 1)


def _vacuous(config: pytest.Config, ledger: Ledger) -> list[str]:
    from .catalogue import vacuity
    from .session import current_session

    if _is_partial(config) and ledger.tallies:
        return []
    session = current_session()
    return vacuity(ledger, session.subject, session.device)


def _report(config: pytest.Config, ledger: Ledger) -> dict[str, Any]:
    from .report import as_json, stale_entries

    # A part of the suite may miss the very cases on which a known failure still fails.
    stale = [] if _is_partial(config) else stale_entries(ledger)
    return as_json(ledger, _vacuous(config, ledger), stale)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of properties, where the suite was run."""
    merged = _merged(_own_ledger())
    if merged is None:
        return
    from .report_formats import as_lines

    terminalreporter.section("moegate")
    report = _report(config, merged)
    complaints = [f"NOT JUDGED: {reason}" for reason in report["not_judged"]]
    complaints += [f"STALE: {reason}" for reason in report["stale"]]
    complaints += [f"ERROR: {reason}" for reason in report["errors"]]
    complaints += [f"INCONCLUSIVE: {reason}" for reason in report["inconclusive"]]
    for line in (*as_lines(report), *complaints, *_notes):
        terminalreporter.line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Collect a worker's ledger.

    Raises:
        UsageError: the worker could not make sense of an option.
    """
    del error
    output = getattr(node, "workeroutput", {})
    if "moegate_refusal" in output:
        _give_up(*output["moegate_refusal"])
    if "moegate_ledger" in output:
        _ledgers[node.gateway.id] = output["moegate_ledger"]


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [entry.name.removeprefix("nvidia") for entry in sorted(Path("/dev").glob("nvidia[0-9]*"))]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Each worker sees one GPU; workers beyond their number share them."""
    gpus = _gpus()
    if not gpus or config.getoption("moegate_device") == "cpu":
        return
    for number, spec in enumerate(specs):
        spec.env["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`-n auto` with `--moegate-device cuda` means one worker a GPU; otherwise xdist decides."""
    return len(_gpus()) or None if config.getoption("moegate_device") == "cuda" else None
