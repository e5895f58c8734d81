"""One stored run: pytest-benchmark's JSON, and beside it how the run ended and where it came from.

pytest-benchmark reads such a file as it is (`pytest-benchmark compare FILE FILE`); what is ours stands under one key of
its own. Reading one needs neither torch nor numpy: a list of ten thousand runs is not to wait for them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

KEY = "moegate_history"
SCHEMA = "moegate-history/1"
RECORD_SCHEMAS = ("moegate-bench/1",)
"""Schemas of `Record.as_dict` that are understood; a test holds the current one against it."""


class ForeignFileError(ValueError):
    """A file that is no stored run: damaged, cut off, or somebody else's."""


@dataclass(frozen=True)
class Point:
    """One contender's time of one workload in one run.

    Attributes:
        device: the GPU's model; for a CPU its architecture and threads too, since "cpu" names no model.
        workload: the workload's id, which holds shape, dtype, M, routing and its hash.
        model, num_tokens, routing, dtype: its parts.
        cache_state: what was proven, not what was asked for.
        subject: who was timed.
        method: "cuda-graph", "cuda-eager" or "host".
        seconds, low, high: median and quartiles over `samples` samples.
        floor_seconds: the least time that the work needs.
        budget_used: of the error budget, by the judge that ran before.
        sm_mhz: the SM clock when the last sample was enqueued; None where it cannot be read.
        path: what ran, in a line.
    """

    device: str
    workload: str
    model: str
    num_tokens: int
    routing: str
    dtype: str
    cache_state: str
    subject: str
    method: str
    seconds: float
    low: float
    high: float
    samples: int
    floor_seconds: float
    budget_used: float
    sm_mhz: float | None
    path: str


@dataclass(frozen=True)
class Run:
    """A stored run.

    Attributes:
        id: twelve hexadecimal digits of the file's SHA-256.
        time: when it ran, ISO 8601 in UTC.
        commit: the full commit id; "" where it is not known.
        commit_time: ISO 8601 in UTC; "" where it is not known.
        branch: as git named it; informative alone.
        dirty: whether files differed from the commit.
        project: the repository's name.
        exit_code: how the run ended; None where nobody said.
        device: the first point's.
        driver, torch, triton, host: of the machine.
        origin: a CI run's address or the storing host's name.
        points: what was timed.
        failures: (workload, subject, reason) of what was not.
    """

    id: str
    time: str
    commit: str
    commit_time: str
    branch: str
    dirty: bool
    project: str
    exit_code: int | None
    device: str
    driver: str
    torch: str
    triton: str
    host: str
    origin: str
    points: tuple[Point, ...]
    failures: tuple[tuple[str, str, str], ...]

    @property
    def outcome(self) -> str:
        """How it ended: "passed", "failed", or "unknown" where nobody said."""
        return outcome_of(self.exit_code)


def outcome_of(exit_code: int | None) -> str:
    """An exit code in a word."""
    return "unknown" if exit_code is None else "failed" if exit_code else "passed"


def to_utc(text: Any) -> str:
    """An ISO 8601 time in UTC, to the second; a time without an offset is taken as UTC, as pytest-benchmark means it.

    Raises:
        ForeignFileError: no such time.
    """
    try:
        time = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        raise ForeignFileError(f"expected a time in ISO 8601, got {text!r}") from None
    time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    return time.isoformat(timespec="seconds")


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ForeignFileError: anything else.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ForeignFileError(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ForeignFileError(f"expected a JSON object, got {type(data).__name__}")
    return data


def read_run(id: str, data: Mapping[str, Any]) -> Run:
    """A stored run from its document.

    Raises:
        ForeignFileError: what is missing or wrong, by name.
    """
    ours = data.get(KEY)
    if not isinstance(ours, Mapping):
        raise ForeignFileError(f"no {KEY!r} in it: it was not stored by `moegate history add`")
    if ours.get("schema") != SCHEMA:
        raise ForeignFileError(f"schema: expected {SCHEMA}, got {ours.get('schema')!r}")
    points = tuple(points_of(data))
    failures = tuple(_failure(row) for row in _list(ours, "failures"))
    if not points and not failures:
        raise ForeignFileError("no benchmark with a moegate record in it, and no failure")
    commit = _mapping(data, "commit_info")
    machine = _machine(data)
    exit_code = ours.get("exit_code")
    if exit_code is not None and (isinstance(exit_code, bool) or not isinstance(exit_code, int)):
        raise ForeignFileError(f"exit_code: expected a whole number or null, got {exit_code!r}")
    revision = str(commit.get("id") or "")
    return Run(
        id=id,
        time=to_utc(data.get("datetime")),
        commit=revision if _is_commit(revision) else "",
        commit_time=to_utc(commit["time"]) if commit.get("time") else "",
        branch=str(commit.get("branch") or ""),
        dirty=bool(commit.get("dirty")),
        project=str(commit.get("project") or ""),
        exit_code=exit_code,
        device=points[0].device if points else device_of(machine),
        driver=str(machine.get("driver") or ""),
        torch=str(machine.get("torch") or ""),
        triton=str(machine.get("triton") or ""),
        host=str(_mapping(data, "machine_info").get("node") or ""),
        origin=str(ours.get("origin") or ""),
        points=points,
        failures=failures,
    )


def points_of(data: Mapping[str, Any]) -> Iterator[Point]:
    """The points of a pytest-benchmark document: of each of our benchmarks, and of the peers beside it.

    Raises:
        ForeignFileError: what is missing or wrong, by the benchmark's name.
    """
    for benchmark in _list(data, "benchmarks"):
        if not isinstance(benchmark, Mapping):
            raise ForeignFileError(f"benchmarks: expected objects, got {type(benchmark).__name__}")
        extra = benchmark.get("extra_info")
        if not isinstance(extra, Mapping) or "schema" not in extra:
            continue  # a benchmark of the user's own beside ours
        name = str(benchmark.get("name"))
        try:
            point = _point(extra)
            stated = float(_mapping(benchmark, "stats")["median"])
            if not math.isclose(stated, point.seconds, rel_tol=1e-6):
                raise ForeignFileError(f"its median is {stated} in stats and {point.seconds} in the record")
            yield point
            for peer in _list(extra, "peers", optional=True):
                yield _point(peer)
        except ForeignFileError as error:
            raise ForeignFileError(f"{name}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, statistics.StatisticsError) as error:
            raise ForeignFileError(f"{name}: {type(error).__name__}: {error}") from None


def device_of(machine: Mapping[str, Any]) -> str:
    """The GPU's model; for a CPU with its architecture and threads."""
    device = str(machine.get("device") or "")
    if not device:
        raise ForeignFileError("machine: expected the device's name, got none")
    return f"cpu ({machine.get('host') or 'unknown'})" if device == "cpu" else device


def _point(record: Mapping[str, Any]) -> Point:
    if record.get("schema") not in RECORD_SCHEMAS:
        raise ForeignFileError(f"schema: expected {' or '.join(RECORD_SCHEMAS)}, got {record.get('schema')!r}")
    samples = [float(sample) for sample in record["timing"]["samples"]]
    seconds = statistics.median(samples)
    floor_seconds = float(record["floor"]["seconds"])
    if not all(sample > 0 and math.isfinite(sample) for sample in (*samples, floor_seconds)):
        raise ForeignFileError("samples and floor: expected finite times of more than 0 s")
    if record["verdict"]["holds"] is not True:
        raise ForeignFileError("verdict: expected one that holds beside a time")
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [seconds] * 3
    clock = record["clocks_after"].get("sm_mhz")
    return Point(
        device=device_of(record["machine"]),
        workload=str(record["workload"]),
        model=str(record["model"]),
        num_tokens=int(record["num_tokens"]),
        routing=str(record["routing"]),
        dtype=str(record["dtype"]),
        cache_state=str(record["cache_state"]),
        subject=str(record["subject"]),
        method=str(record["method"]),
        seconds=seconds,
        low=low,
        high=high,
        samples=len(samples),
        floor_seconds=floor_seconds,
        budget_used=float(record["verdict"]["budget_used"]),
        sm_mhz=None if clock is None else float(clock),
        path=_path(record["path"]),
    )


def _path(path: Mapping[str, Any]) -> str:
    """Backend, assignment and configuration in a line; launches are the gate's."""
    said = []
    for fact in ("backend", "assignment", "config"):
        values = path.get(fact)
        if values:
            last = values[-1]
            said.append(json.dumps(last, sort_keys=True) if isinstance(last, dict | list) else str(last))
    return ", ".join(said)


def _machine(data: Mapping[str, Any]) -> Mapping[str, Any]:
    machine = _mapping(data, "machine_info").get("moegate")
    if isinstance(machine, Mapping):
        return machine
    for benchmark in _list(data, "benchmarks"):
        extra = benchmark.get("extra_info")
        if isinstance(extra, Mapping) and isinstance(extra.get("machine"), Mapping):
            return extra["machine"]
    raise ForeignFileError("machine_info: expected moegate's own beside pytest-benchmark's, got none")


def _failure(row: Any) -> tuple[str, str, str]:
    if not isinstance(row, Mapping):
        raise ForeignFileError(f"failures: expected objects, got {type(row).__name__}")
    return str(row.get("workload") or ""), str(row.get("subject") or ""), str(row.get("reason") or "")


def _is_commit(text: str) -> bool:
    return len(text) >= 40 and all(letter in "0123456789abcdef" for letter in text)


def _mapping(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    if not isinstance(value, Mapping):
        raise ForeignFileError(f"{name}: expected an object, got {type(value).__name__}")
    return value


def _list(data: Mapping[str, Any], name: str, *, optional: bool = False) -> list[Any]:
    value = data.get(name, [] if optional else None)
    if not isinstance(value, list):
        raise ForeignFileError(f"{name}: expected a list, got {type(value).__name__}")
    return value
