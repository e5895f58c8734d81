"""`pytest bench` as a user runs it, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked_runs import run_forked

ROOT = Path(__file__).resolve().parents[1]
FORMAT = ("--moegate-bench-dtype", "int4-g32")
SMALL = ("--moegate-bench-models", "mixtral-8x7b/64,gpt-oss-120b/16", "--moegate-bench-tokens", "1,4", *FORMAT)


RUNS = {
    "measured": (*SMALL, "--benchmark-save-data", "--benchmark-json"),
    "xdist": (*SMALL, "-n", "1", "--benchmark-enable"),
    "disabled": (*SMALL, "--benchmark-disable"),
    "nothing": ("--moegate-bench-models", "gpt-oss-120b/16", "--moegate-bench-tokens", "1", *FORMAT),
    "unknown": ("--moegate-bench-models", "qwen"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(exit code, output) of each run; forked from one process, since most of their time is importing torch."""
    folder = tmp_path_factory.mktemp("bench")
    json_path = folder / "benchmark.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"  # as many processes as runs share the cores
    common = ("bench/test_moe_layer.py", "-q", "-p", "no:cacheprovider", "--moegate-bench-device", "cpu")
    common += ("--moegate-bench-budget", "0.01")
    arguments = {name: (*common, *RUNS[name], *([json_path] if name == "measured" else [])) for name in RUNS}
    return {**run_forked(arguments, ROOT, environment, texts=folder), "json": json_path}


def test_the_suite_stores_device_time_floor_machine_and_verdict(runs):
    code, output = runs["measured"]
    assert code == 0, output
    assert "2 passed, 2 skipped" in output
    data = json.loads(runs["json"].read_text())
    assert data["machine_info"]["moegate"]["device"] == "cpu"
    assert len(data["benchmarks"]) == 2
    for benchmark in data["benchmarks"]:
        extra = benchmark["extra_info"]
        assert benchmark["param"] == extra["workload"]
        assert benchmark["group"] == "mixtral-8x7b/64 int4-g32 uniform-s0 warm"
        assert benchmark["stats"]["data"] == extra["timing"]["samples"]
        assert benchmark["stats"]["median"] == extra["seconds"]
        assert extra["floor"]["seconds"] > 0
        assert extra["verdict"]["holds"]


def test_benchmarks_under_xdist_are_a_usage_error(runs):
    code, output = runs["xdist"]
    assert code == 4, output
    assert "benchmarks were collected under pytest-xdist" in output


def test_disabled_benchmarks_still_verify(runs):
    code, output = runs["disabled"]
    assert code == 0, output
    assert "2 passed, 2 skipped" in output


def test_a_run_that_measures_nothing_fails(runs):
    code, output = runs["nothing"]
    assert code == 1, output
    assert "nothing was measured" in output


def test_bad_options_are_usage_errors(runs):
    code, output = runs["unknown"]
    assert code == 4, output
    assert "model: expected one of qwen3-30b-a3b" in output


def test_the_plugin_imports_nothing_heavy():
    code = (
        "import sys, moegate.bench.plugin; "
        "print([name for name in ('torch', 'triton', 'numpy', 'hypothesis', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
