"""How fast a layer could be: the bytes that must move over the bandwidth, or the operations over the peak.

Bytes are counted once: the weights of the experts that the routing touches on this rank, the adapters that tokens have
on them, the tokens that have a pair here, and the whole output. A kernel that reads more (padding, weights again for
each tile of rows) is slower than its floor; one that is clearly faster did less than the work, or read from a cache.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from .formats import FORMATS
from .workloads import Workload


@dataclass(frozen=True)
class Ceilings:
    """What one device can do at best.

    Attributes:
        read_bandwidth: bytes per second of a pure read of device memory.
        copy_bandwidth: bytes per second of a copy within device memory, bytes read plus bytes written.
        peak: operations per second of a matrix product on random data, by dtype ("bf16", "fp8", "int8", ...).
        source: where the numbers come from.
    """

    read_bandwidth: float
    copy_bandwidth: float
    peak: Mapping[str, float]
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "peak": dict(self.peak)}


H200_PUBLISHED = Ceilings(
    read_bandwidth=4.3e12,
    copy_bandwidth=4.3e12,
    peak={"bf16": 790e12, "fp16": 790e12, "fp8": 1580e12, "int8": 1580e12},
    source="H200, fixed: 4.3 TB/s, 790 TFLOP/s in 16 bits, 1580 in 8",
)
"""Fixed H200 ceilings, so that ratios from different runs share one denominator."""


@dataclass(frozen=True)
class Floor:
    """The least that one workload needs, averaged over the routings that are timed.

    Attributes:
        seconds: the floor of the time of one call.
        bytes: bytes that one call must move.
        operations: floating-point operations of one call, a multiplication and an addition being two.
        distinct_experts: experts of this rank that one call touches.
        bound: "memory" or "compute", whichever sets the floor.
    """

    seconds: float
    bytes: float
    operations: float
    distinct_experts: float
    bound: str


def expert_bytes(workload: Workload) -> int:
    """Bytes of one expert's w13 and w2, with their scales, zero points and biases."""
    model, stored = workload.model, workload.format
    biases = (model.w13_rows + model.hidden_size) * workload.torch_dtype.itemsize if model.has_bias else 0
    return (
        stored.weight_bytes(model.w13_rows, model.hidden_size, parts=2 if model.is_gated else 1)
        + stored.weight_bytes(model.hidden_size, model.intermediate_size)
        + biases
    )


def activation_bytes(workload: Workload, rotation: int = 0) -> int:
    """Bytes of the tokens that have a pair on this rank, and of all rows of the output."""
    model = workload.model
    ids = workload.topk_ids(rotation)
    tokens_here = int((ids < model.local_experts).any(axis=1).sum())
    return (tokens_here + workload.num_tokens) * model.hidden_size * workload.torch_dtype.itemsize


def adapter_bytes(workload: Workload, rotation: int = 0) -> int:
    """Bytes of the adapters that one call must read: both pairs of matrices of each expert that a token meets."""
    model, lora, ids = workload.model, workload.lora, workload.lora_ids(rotation)
    if lora is None or ids is None:
        return 0
    experts = workload.topk_ids(rotation).astype(np.int64)
    met = (ids[:, None] * model.num_experts + experts)[experts < model.local_experts]
    columns = _adapter_columns(workload) + model.w13_rows + model.hidden_size
    return len(np.unique(met)) * lora.rank * columns * workload.torch_dtype.itemsize


def _adapter_columns(workload: Workload) -> int:
    """K of all As of an expert: gate and up have one each."""
    model = workload.model
    return (2 if model.is_gated else 1) * model.hidden_size + model.intermediate_size


def operations(workload: Workload, rotation: int = 0) -> int:
    """Floating-point operations of the products over this rank's pairs; the activation and the sum are left out."""
    model, lora = workload.model, workload.lora
    pairs = int(workload.rows_by_local_expert(rotation).sum())
    of_a_pair = (model.w13_rows + model.intermediate_size) * model.hidden_size
    if lora is not None:
        of_a_pair += lora.rank * (_adapter_columns(workload) + model.w13_rows + model.hidden_size)
    return 2 * pairs * of_a_pair


def floor(workload: Workload, ceilings: Ceilings, rotations: Sequence[int] = (0,)) -> Floor:
    """The floor of a workload, as the mean over `rotations`.

    Raises:
        ValueError: no rotation, or ceilings without a peak for the workload's dtype.
    """
    if not rotations:
        raise ValueError("rotations: expected at least one, got none")
    name = workload.format.peak
    if name not in ceilings.peak:
        known = ", ".join(ceilings.peak)
        raise ValueError(f"ceilings: expected a peak for {name}, got those of {known} ({ceilings.source})")
    peak = ceilings.peak[name]
    rows = []
    for rotation in rotations:
        touched = int(np.count_nonzero(workload.rows_by_local_expert(rotation)))
        moved = touched * expert_bytes(workload) + activation_bytes(workload, rotation)
        moved += adapter_bytes(workload, rotation)
        rows.append((moved / ceilings.read_bandwidth, operations(workload, rotation) / peak, moved, touched))
    memory_seconds, compute_seconds, moved, touched = (statistics.fmean(column) for column in zip(*rows, strict=True))
    return Floor(
        seconds=statistics.fmean(max(row[0], row[1]) for row in rows),
        bytes=moved,
        operations=compute_seconds * peak,
        distinct_experts=touched,
        bound="memory" if memory_seconds >= compute_seconds else "compute",
    )


def measure_ceilings(device: torch.device | str, dtypes: Sequence[str] = ("bf16",)) -> Ceilings:
    """The ceilings of a device, measured now: about a second on a GPU, and less on a CPU.

    Args:
        device: the device.
        dtypes: whose matrix products to time: "bf16", "fp16", "fp32", "fp8" or "int8".
    """
    device = torch.device(device)
    on_gpu = device.type != "cpu"
    # 4 GiB and 128 MiB: several times the last cache.
    elements = 2**30 if on_gpu else 2**25
    seconds = _cuda_seconds if on_gpu else _cpu_seconds
    source = torch.empty(elements, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    num_bytes = source.numel() * source.element_size()
    # Two reductions, since which of them reads faster depends on torch's kernels.
    read = num_bytes / min(seconds(source.sum), seconds(source.amax))
    copy = 2 * num_bytes / seconds(partial(target.copy_, source))
    del source, target
    peak = {}
    for name in dtypes:
        size = 8192 if on_gpu else 512
        peak[name] = 2 * size**3 / seconds(_product(name, size, device))
    return Ceilings(read, copy, peak, f"measured on {device_name(device)}")


def _product(name: str, size: int, device: torch.device) -> Callable[[], object]:
    """A square matrix product of operands of a dtype, in the fastest way that torch has for it."""
    left, right = (torch.empty(size, size, dtype=torch.float32, device=device).normal_() for _ in range(2))
    if name == "fp8" and device.type != "cpu":
        one = torch.ones((), device=device)
        fp8_left, fp8_right = (values.to(torch.float8_e4m3fn) for values in (left, right))
        return partial(torch.ops.aten._scaled_mm, fp8_left, fp8_right.t(), one, one, out_dtype=torch.bfloat16)
    if name == "int8" and device.type != "cpu":
        int8_left, int8_right = ((values * 40).clamp(-127, 127).to(torch.int8) for values in (left, right))
        return partial(torch.ops.aten._int_mm, int8_left, int8_right.t())
    # A CPU has no products of 8 bits: its backend multiplies what they mean, in float32.
    dtype = FORMATS[name].activations if name in FORMATS else torch.float32
    left, right = left.to(dtype), right.to(dtype)
    return partial(torch.mm, left, right, out=torch.empty_like(left))


def device_name(device: torch.device | str) -> str:
    """The device's name as its driver gives it, or "cpu"."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cuda_seconds(run: Callable[[], object], repeats: int = 12) -> float:
    """The median of device times of `run`, enqueued in one go so that launches are never waited for."""
    for _ in range(3):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3


def _cpu_seconds(run: Callable[[], object], repeats: int = 7) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
