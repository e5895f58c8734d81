"""Processes that fail, die and hang; and that what is compiled ahead is what is measured."""

import json
import math
import os
import subprocess
import sys
import time

import pytest

from moegate.bench.worker_pool import NOT_TRIED, WorkerPool


def test_every_job_has_its_own_outcome_whatever_the_others_do():
    done = []
    jobs = [
        (math.sqrt, (4.0,)),
        (math.sqrt, (-1.0,)),
        (os._exit, (7,)),
        (os.abort, ()),
        (time.sleep, (60,)),
        (math.sqrt, (9.0,)),
    ]
    with WorkerPool(3) as pool:
        outcomes = pool.run(jobs, limit=2.0, on_done=lambda: done.append(1))
    assert [outcome.value for outcome in outcomes] == [2.0, None, None, None, None, 3.0]
    assert outcomes[1].error.startswith("ValueError")
    assert [outcome.error for outcome in outcomes[2:5]] == [
        "its process ended with code 7",
        "its process died of SIGABRT",
        "ended after 2 s",
    ]
    assert len(done) == len(jobs)


def test_a_process_is_kept_until_an_error_spoils_it():
    with WorkerPool(1, is_spoiled=lambda error: "math domain" in error or "nonnegative" in error) as pool:
        first = pool.ask(os.getpid, limit=20).value
        assert pool.ask(os.getpid, limit=20).value == first
        assert pool.ask(int, "x", limit=20).error.startswith("ValueError")
        assert pool.ask(os.getpid, limit=20).value == first
        assert pool.ask(math.sqrt, -1.0, limit=20).error
        assert pool.ask(os.getpid, limit=20).value != first


def test_nothing_is_started_after_the_time_is_up():
    with WorkerPool(1) as pool:
        assert pool.run([(math.sqrt, (4.0,))], limit=20, until=time.monotonic() - 1)[0].error == NOT_TRIED
    with pytest.raises(ValueError, match="size: expected at least 1"):
        WorkerPool(0)


_SPECIALISATIONS = """
import json, sys
from itertools import product
from unittest import mock
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit
from moegate.bench import tune_device
from moegate.bench.ahead_of_time import MetaBank
from moegate.bench.tune_candidates import GEMMS, default_pair
from moegate.bench.workloads import MODELS, Workload
from moegate.impl import path
from moegate.impl.fused_moe import fused_experts
from moegate.impl.platform import Platform
from moegate.impl.tuning.kernel_config import KernelConfig, use_kernel_configs

hopper = Platform.parse("cuda:9.0")
backend = make_backend(GPUTarget("cuda", 90, 32))
seen = set()

def record(kernel, grid, *args, **meta):
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, _ = binder(*args, **meta, debug=False, instrumentation_mode="")
    seen.add(f"{kernel.__name__} {specialization} {sorted(meta.items())}")

def launched(run):
    seen.clear()
    with mock.patch.object(path, "launch", record), mock.patch.object(Platform, "of", return_value=hopper):
        run()
    return set(seen)

def layer(workload):
    model, of = workload.model, {"device": "meta"}
    bank = MetaBank(model, workload.format)
    fused_experts(
        torch.empty(workload.num_tokens, model.hidden_size, dtype=workload.torch_dtype, **of),
        bank.w13,
        bank.w2,
        torch.empty(workload.num_tokens, model.top_k, **of),
        torch.empty(workload.num_tokens, model.top_k, dtype=torch.int32, **of),
        expert_map=bank.expert_map,
        global_num_experts=model.num_experts,
        quant=bank.quant,
        backend="triton",
    )

problems, variants = [], {}
for name, tokens, dtype in product(
    ("minimax-m2.5-ep4",), (1, 8192), ("bf16", "fp8-block")
):
    workload = Workload(MODELS[name], tokens, dtype=dtype)
    # Columns that are half a block of scales, and wider than one: whose rows share one scale is another variant.
    for pair in (default_pair(workload, hopper), *((KernelConfig(16, n, 64),) * 2 for n in (64, 256))):
        with use_kernel_configs(*pair):
            real = launched(lambda: layer(workload))
        ahead = launched(lambda: tune_device._compile_layers("meta", [(workload, pair)]))
        if real != ahead:
            problems.append([workload.id, sorted(real ^ ahead)])
        for gemm, config in zip(GEMMS, pair):
            (one,) = launched(lambda: tune_device._compile_gemm("meta", workload, gemm, config))
            if one not in real:
                problems.append([workload.id, gemm, one, sorted(real)])
            known = variants.setdefault(tune_device.gemm_variant(workload, gemm, config), one)
            if known != one:
                problems.append([workload.id, gemm, "shares its variant with another specialisation", one, known])
print(json.dumps({"problems": problems, "variants": len(variants)}))
"""


def test_what_is_compiled_ahead_is_what_is_launched_when_measuring():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SPECIALISATIONS],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["problems"] == []
    assert result["variants"] >= 4
