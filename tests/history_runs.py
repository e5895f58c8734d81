"""Runs as `pytest bench --benchmark-json` writes them, made of real records with times of our choosing."""

import copy
import random
from datetime import UTC, datetime, timedelta
from functools import cache

from pytest_benchmark.stats import Stats

from moegate.bench.floor import Floor
from moegate.bench.history.document import document
from moegate.bench.machine import Clocks, Machine
from moegate.bench.record import Record, VerdictRecord
from moegate.bench.rotation import Rotation
from moegate.bench.timer import Timing
from moegate.bench.workloads import MODELS, Routing, Workload

H200 = "NVIDIA H200"
FLOOR = Floor(20e-6, 1e8, 1e9, 8.0, "memory")


def commit_id(number):
    """The commit of a number: forty digits."""
    return f"{number:08x}" + "5" * 32


def moment(number):
    """The time of a number: a minute for each."""
    return (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)).isoformat()


@cache
def _record(model, num_tokens, routing, device, subject, dtype, driver):
    workload = Workload(MODELS[model], num_tokens, Routing.parse(routing), dtype)
    return Record(
        workload=workload.id,
        model=model,
        num_tokens=num_tokens,
        routing=str(workload.routing),
        dtype=dtype,
        subject=subject,
        timing=Timing((1.0,)),
        method="cuda-graph",
        method_note="",
        floor=FLOOR,
        ceilings={"read_bandwidth": 4e12, "copy_bandwidth": 4e12, "peak": {"bf16": 8e14}, "source": "test"},
        cache_state="cold",
        rotation=Rotation(4, 4, 2**30, 2**30, 2**20, 2.0),
        machine=Machine(device, driver, "13.0", 2**20, "2.13.0", "3.6.0", "3.11", "x86_64, 8 threads"),
        clocks_before=Clocks(1980),
        clocks_after=Clocks(1980),
        path={"backend": ["triton"], "assignment": ["naive"], "launches": {"moe": 2}},
        verdict=VerdictRecord(True, 0.4, "verify_by_budget"),
    ).as_dict()


def record(
    seconds, *, model="qwen3-30b-a3b", num_tokens=8, routing="uniform", device=H200, subject="moegate", dtype="bf16",
    driver="580.1",
):  # fmt: skip
    """A record as plain data; its samples lie around `seconds`."""
    data = copy.deepcopy(_record(model, num_tokens, routing, device, subject, dtype, driver))
    data["timing"]["samples"] = [seconds * factor for factor in (0.995, 1.0, 1.005)]
    return {**data, "seconds": seconds, "ratio_to_floor": seconds / FLOOR.seconds}


def benchmark_json(*records, commit=1, time=1, dirty=False, branch="main"):
    """A file as pytest-benchmark writes it; the commit by number or by id."""
    return {
        "machine_info": {"node": "gpu-box", "moegate": records[0]["machine"]} if records else {"node": "gpu-box"},
        "commit_info": {
            "id": commit if isinstance(commit, str) else commit_id(commit),
            "time": moment(time),
            "author_time": moment(time),
            "dirty": dirty,
            "project": "moe",
            "branch": branch,
        },
        "benchmarks": [
            {
                "group": None,
                "name": f"test_moe_layer[{each['workload']}]",
                "fullname": f"bench/test_moe_layer.py::test_moe_layer[{each['workload']}]",
                "params": None,
                "param": each["workload"],
                "extra_info": {**each, "peers": []},
                "options": {},
                "stats": {**_stats(each["timing"]["samples"]), "iterations": 1},
            }
            for each in records
        ],
        "datetime": moment(time),
        "version": "5.3.1",
    }


def _stats(samples):
    stats = Stats()
    for sample in samples:
        stats.update(sample)
    return stats.as_dict()


def stored(store, *records, exit_code=0, promoted=True, commit=1, time=1, **options):
    """Store a run, promoted where it may be; returns its id."""
    data = benchmark_json(*records, commit=commit, time=time, **options)
    id, _, _ = store.add(document(data, exit_code=exit_code, origin="test"))
    if promoted and exit_code == 0 and not options.get("dirty"):
        store.promote(id, {"main": "refs/heads/main", "promoted_at": moment(time)})
    return id


def noisy(seconds, seed, spread=0.004):
    """A time with the noise of one run."""
    return seconds * (1 + random.Random(seed).gauss(0, spread))
