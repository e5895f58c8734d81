"""Compile the kernels that a call would launch, for a platform that this machine need not have.

The call runs on meta tensors with the launcher replaced by a recorder, so what is compiled is what the launchers ask
for, constants and alignments included. Run as a program: it reads a JSON list of jobs on its standard input, writes
one JSON list of compiled kernels, and must have a process of its own, since one that interprets kernels cannot compile.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from moegate.bench.ahead_of_time import Launch, compile_launch, imagine, resources, target, wide_loads_in_flight
from moegate.impl.batched import batched_experts
from moegate.impl.config import Activation, QuantScheme
from moegate.impl.experts.kernel_form import FormChoice, use_kernel_forms
from moegate.impl.fused_moe import fused_experts
from moegate.impl.lora.table import AdapterTable
from moegate.impl.parallel.travel import Homes, plan_travel, sum_over_ranks
from moegate.impl.parallel.wire import Tokens, Wire
from moegate.impl.platform import Platform
from moegate.impl.quantization import ExpertsQuantization
from moegate.impl.routing import select_experts
from moegate.impl.tuning.kernel_config import KernelConfig, use_kernel_configs

_STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}


def quantised(scheme: str, e: int, rows: int, h: int, i: int, group: int) -> tuple[Any, ...]:
    """w13, w2 and their quantisation on the meta device; a scheme is named `fp8_block`, `int4_w4a16_group_zp`, ..."""

    def meta(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    bits = scheme.partition("_")[0]
    stored = _STORED[bits]
    pack = 2 if stored is torch.uint8 else 1
    block = (group, group) if "block" in scheme else (0, group) if "group" in scheme else None
    if block is None:
        scales = [meta(e, n) if "channel" in scheme else meta(e) for n in (rows, h)]
    else:
        grids = ((rows // i * -(-i // group), -(-h // group)), (-(-h // group), -(-i // group)))
        scales = [
            meta(e, *grid) if block[0] else meta(e, n, k // group)
            for grid, n, k in zip(grids, (rows, h), (h, i), strict=True)
        ]
    zeros = (
        [meta(e, n // 2, k // group, of=torch.uint8) for n, k in ((rows, h), (h, i))] if "zp" in scheme else [None] * 2
    )
    static = [meta(1)] * 2 if "static" in scheme else [None] * 2
    kind = QuantScheme(next(s for s in QuantScheme if s.startswith(bits) and ("w8a16" in scheme) == ("w8a16" in s)))
    quant = ExpertsQuantization(kind, *scales, *zeros, block, *static, per_act_token_quant="token" in scheme)
    return meta(e, rows, h // pack, of=stored), meta(e, h, i // pack, of=stored), quant


def adapted(job: dict[str, Any], local: int, shape: tuple[int, ...], activation: Activation) -> dict[str, Any]:
    """The arguments of a call with adapters: `lora` is (slots, rank)."""
    slots, rank = job["lora"]
    e = job["E"]
    table = AdapterTable(
        slots,
        rank,
        num_experts=e,
        hidden_size=job["H"],
        intermediate_size=job["I"],
        dtype=getattr(torch, job["dtype"]),
        device="meta",
        expert_map=[*range(local), *[-1] * (e - local)],
        is_gated=activation.is_gated,
        interleaved=job.get("interleaved", False),
    )
    return {"adapters": table, "lora_ids": torch.empty(shape, dtype=torch.int32, device="meta")}


def travel(m: int, e: int, top_k: int, h: int, ranks: int, dtype: torch.dtype) -> None:
    """What exchanges launch: tokens with adapters to `ranks` ranks, all of them to every rank, and the sum behind."""

    def meta(*shape: int, of: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    tokens = Tokens(meta(m, h, of=dtype), meta(m, top_k, of=torch.float32), meta(m, top_k), meta(m))
    plan = plan_travel(tokens.topk_ids, Homes(meta(e), meta(e)), meta(ranks + 1), m)
    Wire().pack(tokens, m * min(top_k, ranks), plan)
    Wire().pack(tokens, 2 * m)
    sum_over_ranks(meta(m, h, of=dtype), plan)


def launches(platform: Platform, job: dict[str, Any]) -> list[Launch]:
    """What routing and experts, routing alone, or batched experts launch."""
    m, e, k, h, i = (job.get(name, 1) for name in ("M", "E", "top_k", "H", "I"))
    local = e // 2 if job.get("expert_map") else e
    dtype = getattr(torch, job["dtype"])

    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    activation = Activation(job.get("activation", "silu"))
    rows = (2 if activation.is_gated else 1) * i
    w13, w2, quant = meta(local, rows, h), meta(local, h, i), None
    if job.get("scheme"):
        w13, w2, quant = quantised(job["scheme"], local, rows, h, i, job.get("group", 128))
    options = {"activation": activation, "quant": quant, "interleaved": job.get("interleaved", False)}
    if job.get("bias"):
        options |= {"w13_bias": meta(local, rows), "w2_bias": meta(local, h)}
    if job.get("lora"):
        options |= adapted(job, local, (m,) if not job.get("batched") else (e, m), activation)
    routing = dict(job.get("routing", {}))
    if routing.pop("bias", False):
        routing["e_score_correction_bias"] = meta(e, of=torch.float32)

    def run() -> None:
        if job.get("ranks"):
            travel(m, e, k, h, job["ranks"], dtype)
            return
        if job.get("batched"):
            batched_experts(meta(e, m, h), w13, w2, meta(e, of=torch.int32), **options)
            return
        select_experts(meta(m, e), k, **routing)
        if "routing" in job:
            return
        fused_experts(
            meta(m, h),
            w13,
            w2,
            meta(m, k, of=torch.float32),
            meta(m, k, of=getattr(torch, job.get("ids", "int32"))),
            expert_map=meta(e, of=torch.int32) if job.get("expert_map") else None,
            **options,
        )

    forms = FormChoice.EVERYWHERE if job.get("forms") else FormChoice.GENERAL
    with imagine(platform) as imagined, use_kernel_forms(forms):
        configs = job.get("configs")
        if configs:
            with use_kernel_configs(*(KernelConfig(**config) for config in configs)):
                run()
        else:
            run()
    return imagined.launches


def compile_one(platform: Platform, launch: Launch) -> dict[str, Any]:
    """Compile one launch; its name, constants, shared memory and, for NVIDIA, registers and spilled bytes."""
    gpu = target(platform)
    compiled = compile_launch(platform, launch)
    name = launch.kernel.__name__
    result = {
        "kernel": name,
        "platform": str(platform),
        "constants": {key: value for key, value in launch.meta.items() if isinstance(value, (int, bool, str))},
        "shared_memory": compiled.metadata.shared,
    }
    if gpu.backend == "cuda":
        result |= resources(compiled.asm["cubin"])
        if name.endswith("_rows_kernel"):
            result["wide_loads"] = wide_loads_in_flight(compiled.asm["cubin"])
        if len(sys.argv) > 1:
            cubin = Path(sys.argv[1], f"{name}-{gpu.arch}-{compiled.hash[:8]}.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            result["hash"] = compiled.hash[:8]
    return result


def main() -> None:
    """Compile the jobs on standard input."""
    warnings.filterwarnings("ignore")
    results = []
    for job in json.load(sys.stdin):
        platform = Platform.parse(job["platform"])
        done = set()
        for launch in launches(platform, job):
            if launch.key in done or (job.get("only") and launch.kernel.__name__ not in job["only"]):
                continue
            done.add(launch.key)
            results.append(compile_one(platform, launch) | {"job": job})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
