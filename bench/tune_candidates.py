"""The tiles that a search tries: a grid around what is known to be good, for each GEMM and number of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from ..impl.kernels.sizes import cdiv
from ..impl.platform import Platform
from ..impl.tuning.kernel_config import KernelConfig
from ..impl.tuning.limits import obstacle
from ..impl.tuning.lookup import default_kernel_configs
from .formats import Format
from .workloads import Workload

GEMMS = ("w13", "w2")
"""The two GEMMs by their weights' names."""

Pair = tuple[KernelConfig, KernelConfig]
"""The tiles of the first and of the second GEMM; both have one block_size_m."""

# Bytes of weights in flight below which a layer that streams weights waits, and above which nothing is gained.
_LEAST_IN_FLIGHT, _MOST_IN_FLIGHT = 24 * 1024, 160 * 1024


def gemm_sizes(workload: Workload, gemm: str) -> tuple[int, int]:
    """(N, K) of one expert's weight: [2I, H] for `w13`, [H, I] for `w2`."""
    model = workload.model
    if gemm == "w13":
        return model.w13_rows, model.hidden_size
    return model.hidden_size, model.intermediate_size


def default_pair(workload: Workload, platform: Platform) -> Pair:
    """The tiles that run where no tuned file speaks."""
    model, stored = workload.model, workload.format
    found = default_kernel_configs(
        num_tokens=workload.num_tokens,
        top_k=model.top_k,
        num_experts=model.num_experts,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        dtype=stored.activations,
        platform=platform,
        scheme=stored.scheme,
        block_shape=stored.block_shape,
    )
    return found.w13, found.w2


def candidate_configs(workload: Workload, platform: Platform) -> list[KernelConfig]:
    """The candidates of both GEMMs, each once."""
    return list(dict.fromkeys(config for gemm in GEMMS for config in gemm_candidates(workload, gemm, platform)))


def gemm_candidates(workload: Workload, gemm: str, platform: Platform) -> list[KernelConfig]:
    """One GEMM's candidates, the default first; all fit the platform's shared memory and the expert's weight."""
    n, k = gemm_sizes(workload, gemm)
    stored = workload.format
    default = default_pair(workload, platform)[GEMMS.index(gemm)]
    rows = workload.num_tokens * workload.model.top_k / workload.model.num_experts
    found = [default]
    for block_m in _row_blocks(rows, default.block_size_m):
        for config in _tiles(block_m, rows, k, stored):
            # So many stages fetch one step less ahead: more than there are steps only take memory.
            config = replace(config, num_stages=min(config.num_stages, cdiv(k, config.block_size_k) + 1))
            fits = config.shared_memory(stored.operand_dtype) <= (platform.shared_memory or 1 << 62)
            # A tile of which half lies outside the expert's weight only pads it.
            narrow = config.block_size_n // 2 >= n or config.block_size_k // 2 >= k
            if fits and not narrow and obstacle(config, stored.activations, stored.scheme, platform) is None:
                found.append(config)
    return list(dict.fromkeys(found))


def _row_blocks(rows: float, default: int) -> list[int]:
    """Blocks that hold an expert's mean rows without being mostly padding; the two largest where it has many."""
    if rows >= 64:
        sizes = {64, 128}
    else:
        sizes = {size for size in (16, 32, 64, 128) if 0.75 * rows <= size <= max(16, 3 * rows + 8)}
    return sorted(sizes | {default})


def _tiles(block_m: int, rows: float, k: int, stored: Format) -> Iterator[KernelConfig]:
    size = stored.operand_dtype.itemsize
    if size == 4:
        # Computed on the vector units: registers are short, and wide tiles gain nothing.
        for n, block_k, warps, stages in itertools.product((32, 64, 128), (16, 32), (4, 8), (2, 3)):
            if block_m * n <= 64 * 32 * warps:
                yield KernelConfig(block_m, n, block_k, 1, warps, stages)
        return
    # A step that divides K needs no mask; only where none does, short ones are tried.
    steps = [step for step in (64, 128, 256) if k % step == 0] or [32, 64]
    widest, hiding = 256, []
    if stored.block_shape is not None:
        # One scale serves a step of a tile that lies in one block of them. It multiplies the step's product, which is
        # waited for: the longest step multiplies least often, and more warps hide the wait.
        widest, scale_k = stored.block_shape
        steps = [step for step in steps if scale_k % step == 0][-1:]
        hiding = [(widest, 8)]
    # Where weights are streamed bytes in flight decide, and a step of operands of one byte is half as long.
    depths = (3, 4, 5) if size == 2 else (3, 4, 6, 8)
    if block_m == 16:
        shapes = [(32, 4), (64, 4), (128, 4), *hiding]
        for (n, warps), step, stages, swap in itertools.product(shapes, steps, depths, (False, True)):
            in_flight = n * step * size * stages
            # A swapped operand fills a warp group's instruction with 64 rows of weights.
            if _LEAST_IN_FLIGHT <= in_flight <= _MOST_IN_FLIGHT and not (swap and n < 64):
                yield KernelConfig(16, n, step, 1, warps, stages, swap)
        return
    short = [step for step in steps if step <= 128]
    if block_m == 32:
        shapes = [(64, 4), (128, 4), *hiding, (256, 4), (256, 8)]
        for (n, warps), step, stages, swap in itertools.product(shapes, short, depths[:-1], (False, True)):
            if n <= widest:
                yield KernelConfig(32, n, step, 1, warps, stages, swap)
        return
    # Where an expert has several row blocks the layer computes, and row blocks that walk together share weights in L2.
    computes = rows > 2 * block_m
    if block_m == 64:
        shapes = [(128, 4), (128, 8), (256, 4), (256, 8)] + ([] if computes else [(64, 4)])
        groups, short = ((1, 8), short[:1]) if computes else ((1,), short)
    else:
        shapes = [(128, 4), (128, 8), (256, 8)]
        groups, short = (1, 8, 16), short[:1]
    for (n, warps), step, stages, group in itertools.product(shapes, short, (3, 4), groups):
        if n <= widest:
            yield KernelConfig(block_m, n, step, group, warps, stages)
