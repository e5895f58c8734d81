"""`pytest bench --benchmark-compare-fail`, and what it would let through by itself; what is guarded without a clock."""

import json
import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked_runs import run_forked

from moegate.bench import plugin
from moegate.bench.comparison_gate import unlike_machine
from moegate.bench.gate.guards import Described
from moegate.bench.gate.snapshot import differences, stored, write

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("bench/test_moe_layer.py", "--moegate-bench-models", "mixtral-8x7b/64", "--moegate-bench-dtype", "int4-g32")
COMPARE = ("--benchmark-autosave", "--benchmark-compare")
RUNS = {
    "worse": ("--moegate-bench-tokens", "1", *COMPARE, "--benchmark-compare-fail=median:50%"),
    "as fast": ("--moegate-bench-tokens", "1,4", *COMPARE, "--benchmark-compare-fail=median:1000000%"),
    "another machine": ("--moegate-bench-tokens", "1,4", *COMPARE),
    "guards": ("--override-ini=addopts=",),
}


def run(folder, runs):
    """Exit code and output of each run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    common = ("-q", "-p", "no:cacheprovider", "--moegate-bench-device", "cpu", "--moegate-bench-budget", "0.01")
    arguments = {name: (*common, *more) for name, more in runs.items()}
    return run_forked(arguments, ROOT, environment, texts=folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(exit code, output, storage, failures in its JUnit file) of each run, all of them after the baseline's."""
    folder = tmp_path_factory.mktemp("comparison")
    storage = folder / "storage"
    measured = (*SMALL, "--moegate-bench-tokens", "1,4", "--benchmark-autosave", f"--benchmark-storage={storage}")
    ((code, output),) = run(folder, {"baseline": measured}).values()
    assert code == 0, output
    (baseline,) = storage.rglob("0001_*.json")
    own = {name: folder / name.replace(" ", "-") for name in RUNS}
    junit = {name: folder / f"{own[name].name}.xml" for name in RUNS}
    arguments = {}
    for name, more in RUNS.items():
        shutil.copytree(storage, own[name])
        data = json.loads(baseline.read_text())
        if name == "worse":
            for benchmark in data["benchmarks"]:
                benchmark["stats"]["median"] /= 1e4
        if name == "another machine":
            data["machine_info"]["moegate"]["device"] = "NVIDIA H200"
        (own[name] / baseline.relative_to(storage)).write_text(json.dumps(data))
        what = ("bench/test_guards.py",) if name == "guards" else (*SMALL, f"--benchmark-storage={own[name]}")
        arguments[name] = (*what, *more, f"--junitxml={junit[name]}")
    done = run(folder, arguments)

    def failures(name):
        if not junit[name].exists():
            return []
        return [case.get("name") for case in ET.parse(junit[name]).iter("testcase") if case.find("failure") is not None]

    return {name: (*done[name], own[name], failures(name)) for name in RUNS}


def test_a_removed_benchmark_and_a_slower_one_fail_with_a_summary_and_in_junit(runs):
    code, output, _, failures = runs["worse"]
    assert code == 1, output
    assert "it is in the baseline 0001_" in output
    assert "2 failed, 1 passed" in output
    assert "Traceback" not in output
    assert sorted("-M4-" in failure for failure in failures) == [False, True]


def test_a_failed_run_is_stored_where_no_later_run_finds_it(runs):
    _, _, storage, _ = runs["worse"]
    kept = sorted(storage.rglob("*.json"))
    failed = [file for file in kept if file.parent.name.startswith("failed-")]
    assert (len(kept), len(failed)) == (2, 1)
    data = json.loads(failed[0].read_text())
    assert data["moegate"]["failed"]
    assert len(data["moegate"]["why"]) == 2
    code, output, storage, _ = runs["as fast"]
    assert code == 0, output
    assert not list(storage.glob("failed-*"))
    assert len(list(storage.rglob("000[12]_*.json"))) == 2


def test_a_baseline_of_another_machine_is_a_usage_error(runs):
    code, output, _, _ = runs["another machine"]
    assert code == 4, output
    assert "the baseline was measured on another machine: device 'NVIDIA H200', here 'cpu'" in output


@pytest.mark.parametrize(("disabled", "enabled"), [(False, False), (False, True), (True, True)])
def test_benchmarks_are_refused_under_xdist_unless_they_are_disabled_on_purpose(disabled, enabled):
    options = {"benchmark_disable": disabled, "benchmark_enable": enabled}
    config = SimpleNamespace(rootpath=ROOT, getoption=lambda name, default=None: options.get(name, default))
    with pytest.raises(pytest.UsageError, match="benchmarks were collected under pytest-xdist"):
        plugin.pytest_xdist_node_collection_finished(SimpleNamespace(config=config), ["bench/test_moe_layer.py::test"])
    plugin.pytest_xdist_node_collection_finished(SimpleNamespace(config=config), ["tests/test_other.py::test"])
    options |= {"benchmark_disable": True, "benchmark_enable": False}
    plugin.pytest_xdist_node_collection_finished(SimpleNamespace(config=config), ["bench/test_moe_layer.py::test"])


def test_what_is_guarded_without_a_clock_is_as_it_is_checked_in(runs):
    code, output, _, _ = runs["guards"]
    assert code == 0, output
    assert "8 passed" in output


def test_machines_are_told_apart_by_what_times_depend_on():
    gpu = {"moegate": {"device": "NVIDIA H200", "l2_bytes": 1, "driver": "1", "host": "a"}, "node": "one"}
    assert unlike_machine(gpu, {**gpu, "node": "another runner"}) is None
    assert unlike_machine(gpu, {"moegate": {**gpu["moegate"], "driver": "2"}, "node": "one"}) is None
    assert "device" in str(unlike_machine(gpu, {"moegate": {**gpu["moegate"], "device": "NVIDIA H100"}}))
    cpu = {"moegate": {"device": "cpu", "l2_bytes": 0, "host": "x86_64, 2 threads"}, "node": "one"}
    assert "node" in str(unlike_machine(cpu, {**cpu, "node": "two"}))
    assert "does not say" in str(unlike_machine(cpu, {"node": "one"}))


def test_every_guard_fails_for_what_it_guards(tmp_path):
    before = stored()
    path = next(name for name, facts in before.paths.items() if facts.get("assignment") == "naive")
    kernel = next(name for name, found in before.kernels.items() if "grouped_gemm" in name)

    def whats(paths=None, kernels=None):
        now = Described({**before.paths, **(paths or {})}, {}, {**before.kernels, **(kernels or {})})
        return {change.what for change in differences(before, now) if change.fails}

    facts = before.paths[path]
    assert whats() == set()
    assert whats({path: {**facts, "assignment": "aligned"}}) == {"assignment"}
    assert whats({path: {**facts, "backend": "flashinfer_cutlass"}}) == {"backend"}
    assert whats({path: {**facts, "launches": {**facts["launches"], "copy": 1}}}) == {"launches"}
    assert whats({path: {**facts, "launches": {"gemm": 1}}}) == set()
    assert whats({path: {**facts, "bytes": facts["bytes"] * 1.02}}) == {"bytes"}
    assert whats(kernels={kernel: {**before.kernels[kernel], "spilled": 8}}) == {"spills"}
    assert whats(kernels={kernel: {**before.kernels[kernel], "registers": 255}}) == {"registers"}
    assert (
        whats(kernels={kernel: {**before.kernels[kernel], "registers": before.kernels[kernel]["registers"] - 1}})
        == set()
    )
    gone = Described({name: each for name, each in before.paths.items() if name != path}, {}, before.kernels)
    assert [change.what for change in differences(before, gone)] == ["workload"]
    write(before, tmp_path / "guarded.json")
    assert stored(tmp_path / "guarded.json") == before
    with pytest.raises(ValueError, match="expected guards, got"):
        stored(tmp_path / "none.json")
