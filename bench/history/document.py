"""What is stored of what a run wrote: pytest-benchmark's JSON as it is, `moegate bench --json` in the same form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest_benchmark
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from pytest_benchmark.stats import Stats

from .run import KEY, SCHEMA, ForeignFileError, points_of

BENCH_RUN_SCHEMA = "moegate-bench-run/1"
_OURS = "moegate"


def document(
    data: Mapping[str, Any],
    *,
    exit_code: int | None,
    origin: str,
    commit: Mapping[str, Any] | None = None,
    time: str = "",
) -> dict[str, Any]:
    """What is stored of a run's file.

    Args:
        data: pytest-benchmark's JSON, or that of `moegate bench --json`.
        exit_code: of the run. None: what the file itself says, as `pytest bench` and `moegate bench` write it; another
            pytest-benchmark's file is silent of tests that failed, and can be no baseline then. A run that says it
            failed is a failed one, whatever exit code is handed in.
        origin: a CI run's address or the host's name.
        commit: for `moegate bench --json`, which knows no commit: as pytest-benchmark's `commit_info`.
        time: for `moegate bench --json`: when it ran, ISO 8601.

    Raises:
        ForeignFileError: nothing of moegate's in it, or damaged.
    """
    if KEY in data:
        raise ForeignFileError("it comes from a history already: copy such a file into the other store's folder")
    source, failures = "pytest-benchmark", []
    if data.get("schema") == BENCH_RUN_SCHEMA:
        source, failures = BENCH_RUN_SCHEMA, list(data.get("failures") or [])
        exit_code = exit_code or _exit_code(data, failures)
        data = _as_pytest_benchmark(data, commit or {}, time)
    elif "benchmarks" not in data or "machine_info" not in data:
        raise ForeignFileError(
            f"expected pytest-benchmark's JSON, or {BENCH_RUN_SCHEMA} as `moegate bench --json` writes it, got an "
            f"object with {', '.join(sorted(data)[:8]) or 'nothing in it'}"
        )
    else:
        exit_code, failures = _what_pytest_said(data, exit_code)
    if not list(points_of(data)) and not failures:
        raise ForeignFileError("no benchmark with a moegate record in it, and no failure")
    ours = {"schema": SCHEMA, "exit_code": exit_code, "failures": failures, "origin": origin, "source": source}
    return {**data, KEY: ours}


def _what_pytest_said(data: Mapping[str, Any], exit_code: int | None) -> tuple[int | None, list[dict[str, str]]]:
    """Exit code and failures as our pytest plugin leaves them in the file, under `moegate`."""
    said = data.get("moegate")
    if not isinstance(said, Mapping) or not isinstance(said.get("failed"), bool):
        return exit_code, []
    reasons = [str(why) for why in said.get("why") or []]
    return exit_code or int(said["failed"]), [{"workload": "", "subject": _OURS, "reason": why} for why in reasons]


def _exit_code(run: Mapping[str, Any], failures: list[Mapping[str, Any]]) -> int:
    """As `Run.exit_code`: 1 where ours failed, 3 where nothing was timed; a peer's failure is none."""
    records = run.get("records") or []
    ours = {_OURS} | {record.get("subject") for record in records[:1]}
    if any(failure.get("subject") in ours for failure in failures):
        return 1
    return 0 if records else 3


def _as_pytest_benchmark(run: Mapping[str, Any], commit: Mapping[str, Any], time: str) -> dict[str, Any]:
    by_workload: dict[str, list[Mapping[str, Any]]] = {}
    try:
        for record in run["records"]:
            by_workload.setdefault(record["workload"], []).append(record)
        benchmarks = [_benchmark(group[0], group[1:]) for group in by_workload.values()]
        machine = next((group[0]["machine"] for group in by_workload.values()), None)
    except (KeyError, TypeError, ValueError) as error:
        raise ForeignFileError(f"records: {type(error).__name__}: {error}") from None
    machine_info = dict(pytest_benchmark_generate_machine_info())
    return {
        "machine_info": machine_info | ({} if machine is None else {"moegate": machine}),
        "commit_info": dict(commit),
        "benchmarks": benchmarks,
        "datetime": time,
        "version": pytest_benchmark.__version__,
    }


def _benchmark(record: Mapping[str, Any], peers: list[Mapping[str, Any]]) -> dict[str, Any]:
    """One benchmark under the names that `pytest bench` gives it, so that pytest-benchmark compares the two."""
    stats = Stats()
    for sample in record["timing"]["samples"]:
        stats.update(float(sample))
    name = f"test_moe_layer[{record['workload']}]"
    return {
        "group": f"{record['model']} {record['dtype']} {record['routing']} {record['cache_state']}",
        "name": name,
        "fullname": f"bench/test_moe_layer.py::{name}",
        "params": None,
        "param": record["workload"],
        "extra_info": {**record, "peers": peers},
        "options": {},
        "stats": {
            **{field: getattr(stats, field) for field in stats.fields},
            "data": list(stats.data),
            "iterations": 1,
        },
    }
