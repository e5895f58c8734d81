"""Time the forms of the layer's kernels on Hopper against each other: which tile, which form, from how many rows on.

    python -m moegate.bench.kernel_forms [--out FILE] [--groups decode,mid,prefill] [--models NAME,...]

A development tool: every candidate is checked against the general kernels on the same operands, those that differ are
reported and not timed. Candidates of a group take turns in random order on CUDA graphs whose calls rotate routings and
weight copies. Kernels are compiled by as many processes as there are cores before the first one is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from ..impl import path
from ..impl.config import Activation, ActivationFunction
from ..impl.fused_moe import fused_experts
from ..impl.kernels.activation import activate
from ..impl.kernels.align import align
from ..impl.kernels.combine import combine
from ..impl.kernels.gated_gemm import SortedTile, gated_gemm
from ..impl.kernels.grouped_gemm import grouped_gemm
from ..impl.kernels.quantize import Rows
from ..impl.kernels.sorted_gemm import sorted_gemm
from ..impl.kernels.stream_rows import StreamTile, down_rows, gate_up_rows
from ..impl.kernels.tile import gemm_operands
from ..impl.platform import Platform, Vendor
from ..impl.tuning.lookup import find_kernel_configs
from .timer import CudaClock, capture_graph, interleave
from .workloads import MODELS, Model, Workload

T, S = SortedTile, StreamTile
DEVICE = "cuda"
LEAST_ROUNDS = 5
H200 = Platform(Vendor.NVIDIA, (9, 0), "NVIDIA H200", 132, 232_448)

PREFILL_1 = [
    T(128, 128, 64, 8, 8, 3),
    T(128, 128, 64, 8, 8, 4),
    T(128, 128, 64, 8, 8, 4, half=True),
    T(128, 128, 64, 8, 8, 4, half=True, tma_store=True),
    T(128, 128, 64, 16, 8, 4, half=True),
    T(128, 128, 64, 4, 8, 4, half=True),
    T(128, 128, 64, 8, 8, 3, half=True, programs=132),
    T(128, 128, 64, 8, 8, 3, programs=132, tma_store=True),
    T(128, 64, 64, 8, 8, 3, half=True),
    T(128, 64, 64, 8, 4, 3),
    T(64, 128, 64, 16, 8, 4),
]
PREFILL_2 = [
    T(128, 256, 64, 8, 8, 3),
    T(128, 256, 64, 8, 8, 4),
    T(128, 256, 64, 8, 8, 4, half=True),
    T(128, 256, 64, 8, 8, 3, half=True, programs=132),
    T(128, 256, 64, 8, 8, 3, programs=132, tma_store=True),
    T(128, 256, 64, 8, 8, 3, half=True, programs=132, tma_store=True),
    T(128, 256, 64, 8, 8, 3, tma_store=True),
    T(128, 128, 64, 8, 8, 3, half=True),
    T(128, 128, 64, 8, 8, 3, half=True, tma_store=True),
    T(128, 128, 64, 8, 4, 3, half=True),
    T(128, 128, 64, 8, 4, 3, programs=264, tma_store=True),
    T(64, 256, 64, 16, 8, 4),
]
MID_1 = [
    T(16, 64, 128, 1, 4, 3, swap_ab=True),
    T(16, 64, 64, 1, 4, 5, swap_ab=True),
    T(32, 64, 128, 1, 4, 3, swap_ab=True),
    T(32, 64, 64, 1, 4, 4, swap_ab=True),
    T(64, 64, 64, 1, 4, 4),
    T(64, 128, 64, 1, 8, 4),
    T(64, 128, 64, 8, 8, 4),
    T(128, 64, 64, 1, 8, 3, half=True),
    T(128, 128, 64, 1, 8, 4, half=True),
    T(128, 128, 64, 8, 8, 4, half=True),
]
MID_2 = [
    T(16, 128, 128, 1, 4, 3, swap_ab=True),
    T(16, 64, 128, 1, 4, 4, swap_ab=True),
    T(16, 64, 256, 1, 4, 3, swap_ab=True),
    T(32, 128, 128, 1, 4, 3, swap_ab=True),
    T(32, 64, 128, 1, 4, 4, swap_ab=True),
    T(64, 128, 64, 1, 4, 4),
    T(64, 256, 64, 1, 8, 4),
    T(64, 128, 128, 1, 8, 3),
    T(128, 128, 64, 1, 8, 3, half=True),
    T(128, 256, 64, 1, 8, 4, half=True),
    T(128, 256, 64, 8, 8, 4, half=True),
]
UP = [S(8, 256), S(8, 512), S(4, 512), S(16, 256), S(8, 256, 4), S(16, 256, 3), S(32, 256, 3, 8), S(16, 512, 2, 8)]
# Rows of one expert; a tile reads those of all of a token's experts.
DOWN_OF_8 = [S(4, 256), S(2, 256), S(1, 512), S(4, 128), S(4, 256, 3), S(2, 256, 4), S(8, 256, 1, 8), S(4, 256, 1, 8)]
DOWN_OF_2 = [
    S(16, 256),
    S(8, 256),
    S(8, 512),
    S(4, 512),
    S(16, 256, 3),
    S(8, 256, 4),
    S(32, 256, 1, 8),
    S(8, 1024, 1, 8),
]

GROUPS: dict[str, list[tuple[str, int]]] = {
    "prefill": [
        ("qwen3-30b-a3b", 2048),
        ("qwen3-30b-a3b", 8192),
        ("mixtral-8x7b", 8192),
        ("qwen3.5-35b-a3b", 8192),
    ],
    "mid": [
        ("qwen3-30b-a3b", 8),
        ("qwen3-30b-a3b", 64),
        ("qwen3-30b-a3b", 256),
        ("qwen3-30b-a3b", 1024),
        ("mixtral-8x7b", 64),
        ("mixtral-8x7b", 512),
    ],
    "decode": [
        ("qwen3-30b-a3b", 1),
        ("qwen3-30b-a3b", 4),
        ("qwen3-30b-a3b", 8),
        ("qwen3.5-35b-a3b", 1),
        ("qwen3.5-35b-a3b", 8),
        ("mixtral-8x7b", 1),
    ],
}


def short(tile: SortedTile | StreamTile) -> str:
    """A tile in few characters."""
    if isinstance(tile, StreamTile):
        return f"{tile.rows}x{tile.columns}s{tile.stages}w{tile.num_warps}"
    text = f"{tile.block_size_m}x{tile.block_size_n}x{tile.block_size_k}g{tile.group_size_m}w{tile.num_warps}"
    text += f"s{tile.num_stages}{'x' if tile.swap_ab else ''}{'h' if tile.half else ''}"
    return text + f"{f'p{tile.programs}' if tile.programs else ''}{'t' if tile.tma_store else ''}"


@dataclass
class Setting:
    """One model's operands for M tokens on a device, `calls` of them in turn."""

    model: Model
    num_tokens: int
    device: str
    calls: int = 2
    copies: int = 2
    weights: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        model, m, device = self.model, self.num_tokens, self.device
        on_meta = device == "meta"
        self.function = ActivationFunction(Activation(model.activation))
        generator = None if on_meta else torch.Generator(device).manual_seed(1)

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            values = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return values if on_meta else values.normal_(std=std, generator=generator)

        e, h, i = model.num_experts, model.hidden_size, model.intermediate_size
        if not self.weights:
            copies = 1 if on_meta else self.copies
            self.weights = [(normal(e, 2 * i, h, std=h**-0.5), normal(e, h, i, std=i**-0.5)) for _ in range(copies)]
        self.calls = 1 if on_meta else self.calls
        workload = Workload(model, m)
        self.x = [normal(m, h) for _ in range(self.calls)]
        if on_meta:
            self.ids = [torch.empty((m, model.top_k), dtype=torch.int32, device=device)]
        else:
            self.ids = [workload.topk_ids(call) for call in range(self.calls)]
            self.ids = [torch.as_tensor(ids).to(device=device, dtype=torch.int32) for ids in self.ids]
        shape = (m, model.top_k)
        self.topk_weights = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(self.calls)]
        if not on_meta:
            for weights in self.topk_weights:
                weights.uniform_(0.05, 0.2, generator=generator)
        self.pairs = m * model.top_k
        self.alignments: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        # The most that any block size needs, so that all of a setting's candidates share one piece of memory.
        for name, columns in (("sorted", i), ("y2", h)):
            self.buffer(name, self.pairs + e * 128, columns)

    def alignment(self, block: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of each call, for a block size."""
        if block not in self.alignments:
            e = self.model.num_experts
            self.alignments[block] = [align(ids, block, e, e, None) for ids in self.ids]
        return self.alignments[block]

    def buffer(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """Memory that the calls share."""
        key = f"{name} {columns}"
        if key not in self.buffers or self.buffers[key].shape[0] < rows:
            self.buffers[key] = torch.zeros((rows, columns), dtype=torch.bfloat16, device=self.device)
        return self.buffers[key][:rows]

    def of(self, call: int) -> tuple[Any, ...]:
        """x, ids, topk_weights, w13, w2 of a call."""
        w13, w2 = self.weights[call % len(self.weights)]
        return self.x[call], self.ids[call], self.topk_weights[call], w13, w2

    # What is timed ---------------------------------------------------------------------------------------------------

    def general(self, call: int) -> tuple[torch.Tensor, Callable[[], None], torch.Tensor, Callable[[], None]]:
        """The general kernels' h and y of pairs, and how each is made."""
        x, ids, topk_weights, w13, w2 = self.of(call)
        model = self.model
        configs = find_kernel_configs(
            num_tokens=self.num_tokens,
            top_k=model.top_k,
            num_experts=model.num_experts,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            dtype=torch.bfloat16,
            platform=H200,
        )
        slots, experts, _ = self.alignment(configs.w13.block_size_m)[call]
        routing = {
            "topk_ids": ids,
            "topk_weights": topk_weights,
            "sorted_token_ids": slots,
            "expert_ids": experts,
            "allow_tf32": False,
        }
        gate_up = self.buffer("gate_up", self.pairs, w13.shape[1])
        hidden = self.buffer("hidden", self.pairs, model.intermediate_size)
        y = self.buffer("y", self.pairs, model.hidden_size)
        e = model.num_experts
        rows = Rows("pairs", self.pairs, topk_ids=ids, num_experts=e, num_local_experts=e)

        def first() -> None:
            options = {"mul_weight": False, "a_row_is_token": True, "config": configs.w13}
            grouped_gemm(gate_up, x, gemm_operands(w13), **options, **routing)
            activate(hidden, gate_up, self.function, rows, H200)

        def second() -> None:
            options = {"mul_weight": True, "a_row_is_token": False, "config": configs.w2}
            grouped_gemm(y, hidden, gemm_operands(w2), **options, **routing)

        return hidden, first, y, second

    def gated(self, tile: SortedTile, call: int, *, pdl: bool = False) -> tuple[torch.Tensor, Callable[[], None]]:
        """h in the alignment's order, and how it is made."""
        x, _, topk_weights, w13, _ = self.of(call)
        slots, experts, used = self.alignment(tile.block_size_m)[call]
        h = self.buffer("sorted", slots.shape[0], self.model.intermediate_size)
        options = {"topk_weights": topk_weights, "mul_weight": False, "slots": slots, "expert_ids": experts}
        return h, lambda: gated_gemm(h, x, w13, None, self.function, used_slots=used, tile=tile, pdl=pdl, **options)

    def down(self, tile: SortedTile, call: int, *, pdl: bool = False) -> tuple[torch.Tensor, Callable[[], None]]:
        """y of pairs or of slots, and how it is made."""
        _, _, topk_weights, _, w2 = self.of(call)
        slots, experts, used = self.alignment(tile.block_size_m)[call]
        h = self.buffer("sorted", slots.shape[0], self.model.intermediate_size)
        rows = slots.shape[0] if tile.tma_store else self.pairs
        y = self.buffer("y2", rows, self.model.hidden_size)
        options = {"topk_weights": topk_weights, "mul_weight": True, "slots": slots, "expert_ids": experts}
        options |= {"used_slots": used, "is_sorted": tile.tma_store, "tile": tile, "pdl": pdl}
        return y, lambda: sorted_gemm(y, h, w2, None, **options)

    def up_rows(self, tile: StreamTile, call: int, *, pdl: bool = False) -> tuple[torch.Tensor, Callable[[], None]]:
        """h of pairs, and how it is made."""
        x, ids, topk_weights, w13, _ = self.of(call)
        h = self.buffer("streamed", self.pairs, self.model.intermediate_size)
        options = {"topk_ids": ids, "topk_weights": topk_weights, "mul_weight": False, "expert_map": None}
        options |= {"num_experts": self.model.num_experts, "tile": tile, "pdl": pdl}
        return h, lambda: gate_up_rows(h, x, w13, None, self.function, **options)

    def down_rows(self, tile: StreamTile, call: int, *, pdl: bool = False) -> tuple[torch.Tensor, Callable[[], None]]:
        """The output, and how it is made."""
        _, ids, topk_weights, _, w2 = self.of(call)
        h = self.buffer("streamed", self.pairs, self.model.intermediate_size)
        out = self.buffer("out", self.num_tokens, self.model.hidden_size)
        options = {"topk_ids": ids, "topk_weights": topk_weights, "mul_weight": True, "expert_map": None}
        options |= {"num_experts": self.model.num_experts, "tile": tile, "pdl": pdl}
        return out, lambda: down_rows(out, h, w2, None, **options)

    def layer(self, call: int) -> torch.Tensor:
        """The whole layer as it is today."""
        x, ids, topk_weights, w13, w2 = self.of(call)
        return fused_experts(x, w13, w2, topk_weights, ids, activation=self.model.activation)

    def sorted_layer(self, first: SortedTile, second: SortedTile, call: int, pdl: bool) -> torch.Tensor:
        """Align, two GEMMs and the sum, on buffers made beforehand."""
        _, ids, _, _, _ = self.of(call)
        e = self.model.num_experts
        align(ids, first.block_size_m, e, e, None)
        self.gated(first, call, pdl=pdl)[1]()
        y, run = self.down(second, call, pdl=pdl)
        run()
        out = self.buffer("out", self.num_tokens, self.model.hidden_size)
        combine(out, y, ids, None, e, e, H200)
        return out

    def streamed_layer(self, first: StreamTile, second: StreamTile, call: int, pdl: bool) -> torch.Tensor:
        """Two kernels."""
        self.up_rows(first, call, pdl=pdl)[1]()
        out, run = self.down_rows(second, call, pdl=pdl)
        run()
        return out


def downs(model: Model) -> list[StreamTile]:
    """Candidates that read as much at a time, whatever top_k is."""
    return DOWN_OF_2 if model.top_k <= 2 else DOWN_OF_8


def tiles_of(group: str, num_tokens: int) -> tuple[list[SortedTile], list[SortedTile]]:
    """Candidates of both GEMMs."""
    if group == "prefill":
        return PREFILL_1, PREFILL_2
    return MID_1, MID_2


# Compiling beforehand ------------------------------------------------------------------------------------------------


def everything(models: dict[str, Model], groups: list[str]) -> Iterator[Callable[[], Any]]:
    """Every call whose kernels will be timed, on meta tensors."""
    for group in groups:
        for name, m in GROUPS[group]:
            if name not in models:
                continue
            setting = Setting(models[name], m, "meta")
            yield lambda s=setting: s.layer(0)
            yield lambda s=setting: (s.general(0)[1](), s.general(0)[3]())
            if group == "decode":
                for pdl in (False, True):
                    for tile in UP:
                        yield lambda s=setting, t=tile, p=pdl: s.up_rows(t, 0, pdl=p)[1]()
                    for tile in downs(setting.model):
                        yield lambda s=setting, t=tile, p=pdl: s.down_rows(t, 0, pdl=p)[1]()
                continue
            firsts, seconds = tiles_of(group, m)
            for pdl in (False, True) if group == "mid" else (False,):
                for tile in firsts:
                    yield lambda s=setting, t=tile, p=pdl: s.gated(t, 0, pdl=p)[1]()
                for tile in seconds:
                    yield lambda s=setting, t=tile, p=pdl: s.down(t, 0, pdl=p)[1]()
            for block in (16, 32, 64, 128):
                yield lambda s=setting, b=block: s.alignment(b)


def compile_share(share: int, shares: int, models: dict[str, Model], groups: list[str]) -> None:
    """Compile every `shares`-th kernel into Triton's cache."""
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    done: set[str] = set()
    count = 0

    def record(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        nonlocal count
        del grid
        binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **meta, debug=False, instrumentation_mode="")
        options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
        key = f"{kernel.__name__} {signature} {constants} {attributes} {options}"
        if key in done:
            return
        done.add(key)
        count += 1
        if count % shares != share:
            return
        try:
            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=target, options=options.__dict__)
        except Exception as error:
            print(f"not compiled: {kernel.__name__} {constants}: {str(error)[-300:]}", flush=True)
            return
        # The launcher is compiled too, where there is a driver to link with.
        with suppress(Exception):
            CudaLauncher(compiled.src, compiled.metadata)

    with mock.patch.object(path, "launch", record), mock.patch.object(Platform, "of", return_value=H200):
        for run in everything(models, groups):
            try:
                run()
            except Exception as error:
                print(f"not launched: {type(error).__name__}: {error}", flush=True)
    if share == 0:
        print(f"{count} kernels", flush=True)


def compile_all(arguments: argparse.Namespace) -> None:
    """Compile in as many processes as there are cores."""
    shares = max(1, min(16, (os.cpu_count() or 2)))
    command = [sys.executable, "-m", "moegate.bench.kernel_forms", "--groups", arguments.groups]
    command += ["--models", arguments.models]
    if not arguments.models:
        command = command[:-2]
    children = [subprocess.Popen([*command, "--compile", f"{share},{shares}"]) for share in range(shares)]
    for child in children:
        child.wait()


# Timing --------------------------------------------------------------------------------------------------------------


def difference(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """|found - expected| / |expected|, and the share of elements that differ; NaN where anything is not finite."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm()), float((found != expected).float().mean())


class Bench:
    """Rounds of candidates that take turns."""

    def __init__(self, seconds: float) -> None:
        self.device = torch.device(DEVICE)
        self.seconds = seconds
        self.results: list[dict[str, Any]] = []

    def check(self, name: str, found: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether a candidate computes what it should."""
        error, share = difference(found, expected)
        if not error < 4e-3:
            print(f"  WRONG {name}: error {error:.2e}, {share:.1%} differ", flush=True)
            return False
        return True

    def time(
        self, what: str, candidates: dict[str, Callable[[int], Any]], calls: int, **facts: Any
    ) -> dict[str, float]:
        """Microseconds of a call of each candidate; the fastest first."""
        passes = {}
        for name, run in candidates.items():
            captured = capture_graph([lambda c=c, run=run: run(c) for c in range(calls)], self.device)
            if captured.method != "cuda-graph":
                print(f"  {what} {name}: {captured.note}", flush=True)
                continue
            passes[name] = captured.run
        clock = CudaClock(self.device)
        estimate = 0.0
        for run in passes.values():
            run()
            clock.finish()
            reading = clock.time(run)
            clock.finish()
            estimate += reading()
        rounds = max(LEAST_ROUNDS, min(30, int(self.seconds / max(estimate, 1e-6))))
        samples = interleave(passes, clock, rounds=rounds)
        times = {name: sorted(values)[len(values) // 2] / calls * 1e6 for name, values in samples.items()}
        times = dict(sorted(times.items(), key=lambda item: item[1]))
        self.results.append({"what": what, "rounds": rounds, "us": times} | facts)
        return times


def best(times: dict[str, float], tiles: dict[str, Any], where: Callable[[Any], bool] = lambda tile: True) -> Any:
    """The fastest tile of those."""
    return next((tiles[name] for name in times if name in tiles and where(tiles[name])), None)


def measure(arguments: argparse.Namespace) -> None:
    """Everything; prints three lines a setting."""
    bench = Bench(arguments.seconds)
    models = chosen(arguments)
    weights: dict[str, Any] = {}
    for group in arguments.groups.split(","):
        for name, m in GROUPS[group]:
            if name not in models:
                continue
            start = time.perf_counter()
            model = models[name]
            for other in [key for key in weights if key != name]:
                del weights[other]
            torch.cuda.empty_cache()
            calls = 16 if m <= 16 else 8 if m <= 256 else 4 if m <= 1024 else 2
            setting = Setting(model, m, DEVICE, calls=calls, weights=weights.get(name, []))
            weights[name] = setting.weights
            flops = 2 * setting.pairs * model.hidden_size * model.intermediate_size
            title = f"{name} M={m}"
            run = measure_decode if group == "decode" else measure_sorted
            lines = run(bench, setting, group, title, flops)
            print(f"## {title} ({time.perf_counter() - start:.1f} s)", *lines, sep="\n", flush=True)
            if arguments.out:
                with open(arguments.out, "w") as file:
                    json.dump({"device": torch.cuda.get_device_name(), "results": bench.results}, file, indent=1)


def show(what: str, times: dict[str, float], flops: float, most: int = 4) -> list[str]:
    """One line: the fastest, and what is not a candidate."""
    names = list(times)
    kept = [name for index, name in enumerate(names) if index < most or name[0] in "gl("]
    parts = [f"{name} {times[name]:.1f}" + (f" ({flops / times[name] / 1e6:.0f})" if flops else "") for name in kept]
    return [f"{what}: " + "; ".join(parts)]


def measure_sorted(bench: Bench, setting: Setting, group: str, title: str, flops: float) -> list[str]:
    """Both GEMMs in every form, then the layer of the best."""
    calls = range(setting.calls)
    firsts, seconds = tiles_of(group, setting.num_tokens)
    hidden, make_hidden, y, make_y = setting.general(0)
    make_hidden()
    make_y()
    first_by_name, second_by_name = {}, {}
    generals = [setting.general(call) for call in calls]
    one: dict[str, Callable[[int], Any]] = {"general": lambda c: generals[c][1]()}
    two: dict[str, Callable[[int], Any]] = {"general": lambda c: generals[c][3]()}
    for tile in firsts:
        slots, _, used = setting.alignment(tile.block_size_m)[0]
        real = slots < setting.pairs
        real[int(used) :] = False
        try:
            h, run = setting.gated(tile, 0)
            h.fill_(float("nan"))
            run()
            ok = bench.check(f"{title} gated {short(tile)}", h[real], hidden[slots[real].long()])
        except Exception as error:
            print(f"  {title} gated {short(tile)}: {type(error).__name__} {str(error)[-200:]}", flush=True)
            ok = False
        if ok:
            runs = [setting.gated(tile, call)[1] for call in calls]
            one[short(tile)] = lambda c, runs=runs: runs[c]()
            first_by_name[short(tile)] = tile
    for tile in seconds:
        slots, _, used = setting.alignment(tile.block_size_m)[0]
        real = slots < setting.pairs
        real[int(used) :] = False
        try:
            h = setting.gated(tile, 0)[0]
            h[real] = hidden[slots[real].long()]
            found, run = setting.down(tile, 0)
            found.fill_(float("nan"))
            run()
            found = found[real] if tile.tma_store else found[slots[real].long()]
            ok = bench.check(f"{title} down {short(tile)}", found, y[slots[real].long()])
        except Exception as error:
            print(f"  {title} down {short(tile)}: {type(error).__name__} {str(error)[-200:]}", flush=True)
            ok = False
        if ok:
            runs = [setting.down(tile, call)[1] for call in calls]
            two[short(tile)] = lambda c, runs=runs: runs[c]()
            second_by_name[short(tile)] = tile
    # Real rows for every call, so that neither zeros nor NaN are multiplied.
    for buffer in (value for key, value in setting.buffers.items() if key.startswith("sorted")):
        buffer.normal_()
    hidden.normal_()
    times_1 = bench.time(f"{title} first", one, setting.calls, flops=2 * flops)
    times_2 = bench.time(f"{title} second", two, setting.calls, flops=flops)
    lines = show("first", times_1, 2 * flops) + show("second", times_2, flops)
    layers: dict[str, Callable[[int], Any]] = {"layer now": setting.layer}
    expected = setting.layer(0).clone()
    for block in sorted({tile.block_size_m for tile in first_by_name.values()}):
        a = best(times_1, first_by_name, lambda tile, block=block: tile.block_size_m == block)
        b = best(times_2, second_by_name, lambda tile, block=block: tile.block_size_m == block and not tile.tma_store)
        if a is None or b is None:
            continue
        for pdl in (False, True) if group == "mid" else (False,):
            name = f"{short(a)} | {short(b)}{' pdl' if pdl else ''}"
            run = lambda c, a=a, b=b, pdl=pdl: setting.sorted_layer(a, b, c, pdl)  # noqa: E731
            if bench.check(f"{title} layer {name}", run(0), expected):
                layers[name] = run
    e = setting.model.num_experts
    y_pairs = setting.buffer("y2", setting.pairs, setting.model.hidden_size)
    out = setting.buffer("out", setting.num_tokens, setting.model.hidden_size)
    layers["(combine)"] = lambda c: combine(out, y_pairs, setting.ids[c], None, e, e, H200)
    for block in (16, 128):
        layers[f"(align {block})"] = lambda c, block=block: align(setting.ids[c], block, e, e, None)
    return lines + show("layer", bench.time(f"{title} layer", layers, setting.calls, flops=3 * flops), 3 * flops, 6)


def measure_decode(bench: Bench, setting: Setting, group: str, title: str, flops: float) -> list[str]:
    """Both kernels in every form, then the layer of the best."""
    del group
    calls = range(setting.calls)
    hidden, make_hidden, _, _ = setting.general(0)
    make_hidden()
    expected = setting.layer(0).clone()
    one: dict[str, Callable[[int], Any]] = {}
    two: dict[str, Callable[[int], Any]] = {}
    ups, downs_ = {}, {}
    for tile in UP:
        h, run = setting.up_rows(tile, 0)
        h.fill_(float("nan"))
        run()
        if bench.check(f"{title} up {short(tile)}", h, hidden):
            runs = [setting.up_rows(tile, call)[1] for call in calls]
            one[short(tile)] = lambda c, runs=runs: runs[c]()
            ups[short(tile)] = tile
    for tile in downs(setting.model):
        setting.up_rows(tile, 0)[0].copy_(hidden)
        out, run = setting.down_rows(tile, 0)
        out.fill_(float("nan"))
        run()
        if bench.check(f"{title} down {short(tile)}", out, expected):
            runs = [setting.down_rows(tile, call)[1] for call in calls]
            two[short(tile)] = lambda c, runs=runs: runs[c]()
            downs_[short(tile)] = tile
    generals = [setting.general(call) for call in calls]
    one["general"] = lambda c: generals[c][1]()
    two["general"] = lambda c: generals[c][3]()
    times_1 = bench.time(f"{title} up", one, setting.calls)
    times_2 = bench.time(f"{title} down", two, setting.calls)
    layers: dict[str, Callable[[int], Any]] = {"layer now": setting.layer}
    firsts = [ups[name] for name in times_1 if name in ups][:2]
    seconds = [downs_[name] for name in times_2 if name in downs_][:2]
    for a in firsts:
        for b in seconds:
            for pdl in (False, True):
                name = f"{short(a)} | {short(b)}{' pdl' if pdl else ''}"
                run = lambda c, a=a, b=b, pdl=pdl: setting.streamed_layer(a, b, c, pdl)  # noqa: E731
                if bench.check(f"{title} layer {name}", run(0), expected):
                    layers[name] = run
    lines = show("up", times_1, 0, 5) + show("down", times_2, 0, 5)
    return lines + show("layer", bench.time(f"{title} layer", layers, setting.calls), 0, 6)


def chosen(arguments: argparse.Namespace) -> dict[str, Model]:
    """The models of the command line."""
    names = arguments.models.split(",") if arguments.models else sorted(MODELS)
    return {name: MODELS[name] for name in names}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", default="prefill,mid,decode")
    parser.add_argument("--models", default="")
    parser.add_argument("--seconds", type=float, default=0.25, help="of rounds for each set of candidates")
    parser.add_argument("--out")
    parser.add_argument("--steps", default="compile,measure", help="compile, measure, or both")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        share, shares = (int(part) for part in arguments.compile.split(","))
        compile_share(share, shares, chosen(arguments), arguments.groups.split(","))
        return
    start = time.perf_counter()
    if "compile" in arguments.steps:
        compile_all(arguments)
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    if "measure" in arguments.steps:
        measure(arguments)
        print(f"measured in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
