"""The search for the grouped GEMM's tiles: measure candidates on a workload, keep every result and every failure.

Candidates are compiled side by side in processes of their own, which also find those that cannot be launched or break
the device. Each is then checked against the plain layer, timed briefly, and the best are timed again, interleaved.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from ..impl.fused_moe import fused_experts
from ..impl.platform import Platform
from ..impl.tuning.kernel_config import KernelConfig, layer_kernel_configs, use_kernel_configs
from .floor import expert_bytes
from .machine import l2_bytes
from .operands import ExpertsCall, Operands, WeightBank, make_operands
from .rotation import plan_rotation
from .runner import expect_right
from .selection import choose_device, select_workloads
from .timer import CudaClock, HostClock, Timing, capture_graph, interleave, one_after_another
from .verification import judge_rows, plain_experts
from .workloads import Workload

Pair = tuple[KernelConfig, KernelConfig]
"""The tiles of the first and of the second GEMM; both have one block_size_m."""

# A compiling process holds the layer's weights, since Triton specialises on what it is called with.
_COMPILE_MEMORY_SHARE = 0.5
# What the driver says of a fault after which no kernel runs in the process any more.
_DEVICE_FAULTS = ("illegal memory access", "misaligned address", "launch failure", "illegal instruction", "device-side")
_BRIEF_ROUNDS, _FINAL_ROUNDS, _FINALISTS = 5, 30, 6


@dataclass(frozen=True)
class Trial:
    """One candidate's outcome.

    Attributes:
        w13: the first GEMM's tile.
        w2: the second GEMM's tile.
        timing: seconds of a call of the whole layer; None where it failed.
        error: why it failed, else empty.
        final: whether it was timed interleaved with the other best ones; compare only those closely.
    """

    w13: KernelConfig
    w2: KernelConfig
    timing: Timing | None = None
    error: str = ""
    final: bool = False

    @property
    def seconds(self) -> float:
        """The median time of a call, infinite where it failed."""
        return float("inf") if self.timing is None else self.timing.median

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON holds."""
        seconds = None if self.timing is None else self.timing.median
        return {
            "w13": self.w13.as_dict(),
            "w2": self.w2.as_dict(),
            "seconds": seconds,
            "error": self.error,
            "final": self.final,
        }


def candidate_configs(workload: Workload, platform: Platform) -> list[KernelConfig]:
    """A grid around what is known to be good, cut to what fits the platform's shared memory and the layer."""
    model = workload.model
    rows = 2 * workload.num_tokens * model.top_k / model.num_experts
    ideal = min((16, 32, 64, 128), key=lambda size: abs(size - rows) if size >= rows else size * 1e6)
    if rows > 128:
        ideal = 128
    rows_choices = sorted({size for size in (ideal // 2, ideal, ideal * 2) if 16 <= size <= 128})
    candidates = []
    for block_m, block_n, block_k, warps, stages, group, swap in itertools.product(
        rows_choices, (64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4, 5), (1, 8), (False, True)
    ):
        config = KernelConfig(block_m, block_n, block_k, group, warps, stages, swap)
        narrow = min(2 * model.intermediate_size, model.hidden_size)
        if block_n // 2 >= narrow or block_k // 2 >= min(model.hidden_size, model.intermediate_size):
            continue
        # More than 128 accumulators a thread spill; a swapped operand needs a warp group's 64 rows of weights.
        if block_m * block_n > 128 * 32 * warps or (swap and block_m > 32):
            continue
        # Sweeping rows in groups shares weights between row blocks: pointless while an expert has one.
        if group > 1 and rows <= 2 * block_m:
            continue
        if config.shared_memory(workload.torch_dtype) <= (platform.shared_memory or 1 << 62):
            candidates.append(config)
    return candidates


def measure_pairs(
    workload: Workload,
    pairs: Sequence[Pair],
    *,
    device: torch.device | str,
    experts: ExpertsCall = fused_experts,
    bank: WeightBank | None = None,
    compile_processes: int | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """Measure the whole layer under each pair of tiles; a failing pair is recorded, and the others go on.

    Args:
        workload: the layer, its tokens and routing.
        pairs: candidates.
        device: where.
        experts: the implementation; it must follow `use_kernel_configs`. Only `fused_experts` is compiled beforehand.
        bank: weights to share with other searches.
        compile_processes: processes that compile beforehand; None: as cores and memory allow, 0: none.
        on_progress: called once a pair.

    Returns:
        A trial for each pair, fastest first, the failures last.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    if on_gpu and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    bank = bank or WeightBank(workload.model, workload.torch_dtype, device)
    with torch.cuda.device(device) if on_gpu else nullcontext():
        rotation = plan_rotation(
            workload, l2_bytes(device), max_copies=min(16, bank.room_for(workload)), min_calls=4 if on_gpu else 1
        )
        operands = [make_operands(workload, bank, call, rotation.copy_of(call)) for call in range(rotation.calls)]
        outcomes = _compile_all(workload, pairs, device, compile_processes if experts is fused_experts else 0)
        clock = CudaClock(device) if on_gpu else HostClock()
        right = plain_experts(operands[0])
        trials: list[Trial] = []
        broken = False
        for pair, outcome in zip(pairs, outcomes, strict=True):
            if outcome or broken:
                trials.append(Trial(*pair, error=outcome or "not tried: an earlier pair broke the device"))
            else:
                trials.append(_try_pair(pair, experts, operands, right, clock))
                broken = _is_device_fault(trials[-1].error)
            on_progress()
        best = sorted((trial for trial in trials if not trial.error), key=lambda trial: trial.seconds)[:_FINALISTS]
        if len(best) > 1 and not broken:
            passes = {
                str(i): _one_pass((trial.w13, trial.w2), experts, operands, device) for i, trial in enumerate(best)
            }
            samples = interleave(passes, clock, rounds=_FINAL_ROUNDS)
            for i, trial in enumerate(best):
                timing = Timing(tuple(sample / rotation.calls for sample in samples[str(i)]))
                trials[trials.index(trial)] = replace(trial, timing=timing, final=True)
    return sorted(trials, key=lambda trial: (not trial.final, trial.seconds))


def search(
    workload: Workload,
    candidates: Sequence[KernelConfig] | None = None,
    *,
    device: torch.device | str,
    experts: ExpertsCall = fused_experts,
    bank: WeightBank | None = None,
    compile_processes: int | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """Find tiles for both GEMMs: the first one's over all candidates, then the second one's beside the best first.

    Arguments are those of `measure_pairs`; `candidates` None is `candidate_configs`.

    Returns:
        The trials of the second step, which has the default among them, fastest first; then those of the first.
    """
    device = torch.device(device)
    platform = Platform.of(device)
    bank = bank or WeightBank(workload.model, workload.torch_dtype, _indexed(device))
    candidates = candidate_configs(workload, platform) if candidates is None else candidates
    model = workload.model
    default13, default2, _ = layer_kernel_configs(
        num_tokens=workload.num_tokens,
        top_k=model.top_k,
        num_experts=model.num_experts,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        dtype=workload.torch_dtype,
        platform=platform,
    )
    measure = partial(
        measure_pairs,
        workload,
        device=device,
        experts=experts,
        bank=bank,
        compile_processes=compile_processes,
        on_progress=on_progress,
    )
    default = (default13, default2)
    firsts = [(config, replace(default2, block_size_m=config.block_size_m)) for config in candidates]
    first_step = measure(list(dict.fromkeys([default, *firsts])))
    if first_step[0].error:
        return first_step
    best = first_step[0]
    seconds = [(best.w13, c) for c in candidates if c.block_size_m == best.w13.block_size_m]
    second_step = measure(list(dict.fromkeys([default, (best.w13, best.w2), *seconds])))
    return [*second_step, *first_step]


def _try_pair(
    pair: Pair, experts: ExpertsCall, operands: Sequence[Operands], right: torch.Tensor, clock: CudaClock | HostClock
) -> Trial:
    try:
        with use_kernel_configs(*pair):
            out = operands[0].pass_to(experts)
        expect_right("candidate", "its result", judge_rows(out, right, operands[0].hidden_states.dtype))
        run = _one_pass(pair, experts, operands, right.device)
        run()
        samples = interleave({"": run}, clock, rounds=_BRIEF_ROUNDS)[""]
    except Exception as error:  # a candidate that cannot be compiled or launched is a result
        return Trial(*pair, error=f"{type(error).__name__}: {error}"[:300])
    return Trial(*pair, timing=Timing(tuple(sample / len(operands) for sample in samples)))


def _one_pass(
    pair: Pair, experts: ExpertsCall, operands: Sequence[Operands], device: torch.device
) -> Callable[[], object]:
    def call(each: Operands) -> torch.Tensor:
        with use_kernel_configs(*pair):
            return each.pass_to(experts)

    calls = [partial(call, each) for each in operands]
    return (capture_graph if device.type == "cuda" else one_after_another)(calls, device).run


def _compile_all(workload: Workload, pairs: Sequence[Pair], device: torch.device, processes: int | None) -> list[str]:
    """Run each pair once in processes of their own: "" where that went well or was not tried, else the error."""
    if processes is None and device.type != "cuda":
        processes = 0
    if processes is None:
        layer = expert_bytes(workload) * workload.model.local_experts
        free = torch.cuda.mem_get_info(device)[0]
        processes = min(os.cpu_count() or 1, len(pairs) // 2, int(free * _COMPILE_MEMORY_SHARE / layer))
    if processes < 1:
        return [""] * len(pairs)
    context = multiprocessing.get_context("spawn")
    outcomes = [""] * len(pairs)
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        futures = [pool.submit(_compile_one, workload, pair, str(device)) for pair in pairs]
        for index, future in enumerate(futures):
            try:
                outcomes[index] = future.result()
            except BrokenProcessPool:
                # A process died, and took the answers of its neighbours along: here they run one by one.
                break
    return outcomes


_compile_state: dict[str, Operands | bool] = {}


def _compile_one(workload: Workload, pair: Pair, device: str) -> str:
    """In a compiling process: the error that a pair raises, "" for none."""
    if _compile_state.get("broken"):
        return ""
    where = torch.device(device)
    try:
        if where.type == "cuda":
            torch.cuda.set_device(where)
        operands = _compile_state.get("operands")
        if not isinstance(operands, Operands):
            operands = make_operands(workload, WeightBank(workload.model, workload.torch_dtype, where), 0, 0)
            _compile_state["operands"] = operands
        with use_kernel_configs(*pair):
            operands.pass_to(fused_experts)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
    except torch.OutOfMemoryError:
        return ""  # its neighbours hold the memory, which says nothing about the pair
    except Exception as error:
        # After a fault on the device nothing more runs in this process; what it was given next is still unjudged.
        _compile_state["broken"] = _is_device_fault(str(error))
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def _is_device_fault(message: str) -> bool:
    return any(fault in message for fault in _DEVICE_FAULTS)


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def main() -> None:
    """`python -m moegate.bench.tune`: search tiles for models and numbers of tokens, and print the best of each."""
    parser = argparse.ArgumentParser(prog="python -m moegate.bench.tune", description=main.__doc__)
    parser.add_argument("--models", required=True, help="names, comma-separated")
    parser.add_argument("--tokens", help="numbers of tokens M, comma-separated")
    parser.add_argument("--limit", type=int, help="measure only so many candidates, drawn with a fixed seed")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every trial")
    options = parser.parse_args()
    device = choose_device()
    console = Console(width=None if sys.stdout.isatty() else 200)
    found = {}
    for workload in select_workloads(device, models=options.models, tokens=options.tokens):
        candidates = candidate_configs(workload, Platform.of(device))
        if options.limit and options.limit < len(candidates):
            candidates = random.Random(0).sample(candidates, options.limit)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(workload.id, total=None)
            trials = search(workload, candidates, device=device, on_progress=partial(progress.advance, task))
        found[workload.id] = [trial.as_dict() for trial in trials]
        console.print(f"{workload.id}: {len(trials)} trials, {sum(bool(trial.error) for trial in trials)} failed")
        for trial in trials[:4]:
            console.print(
                f"  {trial.seconds * 1e6:9.2f} us  w13 {trial.w13}\n               w2 {trial.w2}  {trial.error}"
            )
    if options.json:
        options.json.write_text(json.dumps({"schema": "moegate-tune-trials/1", "trials": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
