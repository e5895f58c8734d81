"""pytest's side of the benchmarks: options, machine information, and guards against runs that measure nothing.

It is loaded wherever moegate is installed, so nothing heavy is imported here before one of our benchmarks is collected.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .session import LayerBench
    from .workloads import Workload

_ROOM = Path(__file__).resolve().parent
# How many of our benchmarks were collected, and how many of them were really measured (or, disabled, verified).
COLLECTED = pytest.StashKey[int]()
DONE = pytest.StashKey[int]()
# Why the run failed, before anything of it is stored.
FAILED = pytest.StashKey[list[str]]()
_BENCH = pytest.StashKey["LayerBench"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of `pytest bench`; `python -m moegate.bench` has the same."""
    group = parser.getgroup("moegate bench")
    group.addoption(
        "--moegate-bench-models", metavar="NAMES", help="models, comma-separated (default: all that can run)"
    )
    group.addoption("--moegate-bench-tokens", metavar="M,...", help="numbers of tokens, comma-separated")
    group.addoption(
        "--moegate-bench-routing", metavar="NAMES", default="uniform", help="uniform, zipf<exponent>, all-to-one"
    )
    group.addoption("--moegate-bench-dtype", metavar="NAME", help="bf16, fp16, fp32, fp8-block, int4-g128, ...")
    group.addoption(
        "--moegate-bench-device", metavar="DEVICE", help="cuda, cuda:N or cpu (default: a GPU if there is one)"
    )
    group.addoption(
        "--moegate-bench-peer",
        metavar="FILE.py:CALLABLE",
        action="append",
        default=[],
        help="another fused_experts, timed beside ours; may be repeated",
    )
    group.addoption(
        "--moegate-bench-budget",
        metavar="SECONDS",
        type=float,
        default=0.6,
        help="of samples for each workload (default: %(default)s)",
    )
    group.addoption(
        "--moegate-bench-fixed-ceilings",
        action="store_true",
        help="floors from fixed H200 ceilings instead of measured ones",
    )
    group.addoption(
        "--moegate-bench-unlike-machine",
        action="store_true",
        help="compare with a baseline of another machine all the same",
    )
    group.addoption(
        "--moegate-gate-base",
        metavar="REV",
        help="compare with this revision, measured in the same run, instead of timing alone (`moegate gate`)",
    )
    group.addoption(
        "--moegate-gate-minutes",
        metavar="MINUTES",
        type=float,
        default=6.0,
        help="for all of it (default: %(default)s)",
    )
    group.addoption("--moegate-gate-allow-dirty", action="store_true", help="judge a checkout with changes")
    group.addoption("--moegate-gate-json", metavar="FILE", help="write the gate's record")
    group.addoption(
        "--moegate-guards-accept",
        action="store_true",
        help="write the launches, paths, bytes and registers that are guarded anew, instead of judging them",
    )


def selected_workloads(config: pytest.Config) -> list[Workload]:
    """The workloads that the options select.

    Raises:
        pytest.UsageError: an option that cannot be understood.
    """
    from .selection import choose_device, select_workloads

    try:
        return select_workloads(choose_device(config.getoption("moegate_bench_device")), **selection_words(config))
    except ValueError as error:
        raise pytest.UsageError(f"--moegate-bench: {error}") from error


def selection_words(config: pytest.Config) -> dict[str, Any]:
    """What the options say of workloads, as `select_workloads` takes it."""
    names = {"models": "models", "tokens": "tokens", "routings": "routing", "dtype": "dtype"}
    return {word: config.getoption(f"moegate_bench_{name}") for word, name in names.items()}


def layer_bench_of(config: pytest.Config) -> LayerBench:
    """The one bench of this run.

    Raises:
        pytest.UsageError: a device that is not there, or a peer that cannot be loaded.
    """
    if _BENCH not in config.stash:
        from .selection import choose_device
        from .session import LayerBench

        option = config.getoption
        try:
            config.stash[_BENCH] = LayerBench(
                choose_device(option("moegate_bench_device")),
                peers=option("moegate_bench_peer"),
                fixed_ceilings=option("moegate_bench_fixed_ceilings"),
                budget=option("moegate_bench_budget"),
            )
        except ValueError as error:
            raise pytest.UsageError(f"--moegate-bench: {error}") from error
    return config.stash[_BENCH]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse bad options before anything is collected, where benchmarks were asked for by name."""
    if not hasattr(session.config, "workerinput") and _asks_for_our_benchmarks(session.config):
        selected_workloads(session.config)
        layer_bench_of(session.config)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Count our benchmarks."""
    session.config.stash[COLLECTED] = sum(_ROOM in item.path.resolve().parents for item in session.items)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The gate's tests are there where a base is named, and then alone."""
    if collection_path.suffix != ".py" or _ROOM not in collection_path.resolve().parents:
        return None
    is_gate = collection_path.name == "test_gate.py"
    is_test = collection_path.name.startswith("test_")
    return True if is_test and is_gate != bool(config.getoption("moegate_gate_base")) else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Judge a compared run before pytest-benchmark stores it; a run in which each benchmark was skipped is none."""
    config = session.config
    if config.stash.get(COLLECTED, 0):
        _close_comparison(session)
    yield
    collected, done = config.stash.get(COLLECTED, 0), config.stash.get(DONE, 0)
    skipped_on_purpose = config.getoption("benchmark_skip", False) or config.getoption("collectonly")
    if collected and not done and not skipped_on_purpose and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line("moegate bench: nothing was measured", red=True)


def _close_comparison(session: pytest.Session) -> None:
    from . import comparison_gate

    config = session.config
    benchmarks: Any = getattr(config, "_benchmarksession", None)
    if benchmarks is None or hasattr(config, "workerinput"):
        return
    prefix = f"{_ROOM.relative_to(config.rootpath).as_posix()}/" if _ROOM.is_relative_to(config.rootpath) else ""
    findings = comparison_gate.judge(benchmarks, prefix)
    if findings:
        comparison_gate.as_failed_tests(config, findings)
        session.testsfailed += len(findings)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        benchmarks.compare_fail = []  # it is judged; again it would end in a traceback instead of a summary
    failed = session.exitstatus != pytest.ExitCode.OK
    config.stash[FAILED] = [f"{finding.test}: {finding.why}" for finding in findings] or (
        [f"pytest ended with {int(session.exitstatus)}"] if failed else []
    )
    if failed:
        comparison_gate.never_a_baseline(benchmarks)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Say in what is stored whether the run failed, and why."""
    if config.stash.get(COLLECTED, 0):
        why = config.stash.get(FAILED, [])
        output_json["moegate"] = {"failed": bool(why), "why": why}


# Before pytest-benchmark's own, which only warns, and fails where the storage lies outside of the current folder.
@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Refuse a baseline of another machine.

    Raises:
        pytest.UsageError: it is, or does not say.
    """
    if config.getoption("moegate_bench_unlike_machine") or not _asks_for_our_benchmarks(config):
        return
    from .comparison_gate import unlike_machine

    why = unlike_machine(machine_info, compared_benchmark["machine_info"])
    if why:
        raise pytest.UsageError(f"--benchmark-compare: {why} (--moegate-bench-unlike-machine compares all the same)")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Iterable[str]) -> None:
    """Refuse benchmarks under xdist, where pytest-benchmark would turn them off and the run would pass.

    Raises:
        pytest.UsageError: one of ours was collected, and benchmarks were not disabled or skipped on purpose.
    """
    config = node.config
    disabled = config.getoption("benchmark_disable", False) and not config.getoption("benchmark_enable", False)
    if disabled or config.getoption("benchmark_skip", False):
        return
    for node_id in ids:
        if _ROOM in (config.rootpath / node_id.split("::")[0]).resolve().parents:
            raise pytest.UsageError(
                f"{node_id}: benchmarks were collected under pytest-xdist, which would disable them; "
                "run them without -n, or pass --benchmark-disable to verify only"
            )


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Say which GPU, driver and kernel software our benchmarks ran on."""
    if config.stash.get(COLLECTED, 0) or _asks_for_our_benchmarks(config):
        from dataclasses import asdict

        from .machine import describe_machine
        from .selection import choose_device

        machine_info["moegate"] = asdict(describe_machine(choose_device(config.getoption("moegate_bench_device"))))


def _asks_for_our_benchmarks(config: pytest.Config) -> bool:
    """Whether a command line argument names our benchmarks: what can be known before anything is collected."""
    for argument in config.args:
        name = argument.split("::")[0]
        path = (config.invocation_params.dir / name).resolve()
        if name.split(".")[:2] == ["moegate", "bench"] or _ROOM in (path, *path.parents):
            return True
    return False
