"""`python -m moegate.bench.parallel`: collectives and a layer that all GPUs of this machine share, beside one GPU.

Each rank is a process. A sample is several calls back to back between two barriers, and counts as long as its slowest
rank takes. Calls differ in their tokens and routing, so the rows that an all-to-all carries do too. Every output is
judged before its time counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import spawn as start_processes

from ..conformance.console import PlainConsole
from ..impl.experts_module import RoutedExperts
from ..impl.fused_moe import fused_experts
from ..impl.parallel.collectives import ProcessGroup
from ..impl.parallel.exchange import Launched, Received
from ..impl.parallel.experts import ParallelExperts
from ..impl.parallel.mesh import Mesh
from ..impl.parallel.placement import linear_placement
from ..impl.parallel.ranks import Ranks, connect
from ..impl.parallel.wire import Tokens
from ..impl.whole_file import write_whole
from .formats import find_format
from .operands import Operands, WeightBank, make_operands
from .timer import synchronise
from .verification import verify_reduced
from .workloads import Workload, find_model

SCHEMA = "moegate-bench-parallel/1"
MEGABYTES = (4, 8, 16, 32, 64)
EXCHANGES = ("all_gather", "all_to_all")
# As many calls in a row as a model has layers, about: the first one alone waits for the host from its start on.
ROUNDS, CALLS, WARM_UP = 12, 32, 5
# Calls that differ, in turns.
BATCHES = 5
# Communication and permutation may take so much more than the bytes alone.
FACTOR, FIXED = 1.5, 60e-6


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call on the slowest rank."""
    for _ in range(WARM_UP):
        run()
    samples = []
    for _ in range(ROUNDS):
        synchronise(device)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        synchronise(device)
        samples.append((time.perf_counter() - start) / CALLS)
    slowest = torch.tensor(samples, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def timed_captured(run: Callable[[], Any], device: torch.device) -> float | None:
    """The same of a call that was captured in a CUDA graph, which costs the host one launch; None without a GPU."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return timed(graph.replay, device)


def measure_collectives(group: ProcessGroup, device: torch.device, megabytes: Sequence[int]) -> list[dict[str, Any]]:
    """Each collective by what a rank receives from the others in all: bytes, seconds and bytes a second."""
    return [row for size in megabytes for row in _collectives_of_size(group, device, size * 2**20)]


def _collectives_of_size(group: ProcessGroup, device: torch.device, size: int) -> list[dict[str, Any]]:
    # Rows of 2 KB, and of each rank so many that it receives `size` bytes from the others.
    n = group.size
    each = max(1, size // 2048 // max(1, n - 1))
    part = torch.randn(each, 1024, device=device).bfloat16()
    whole = torch.randn(each * n, 1024, device=device).bfloat16()
    other, splits, received = torch.empty_like(whole), [each] * n, each * 2048 * (n - 1)
    calls = {
        "all_gather": lambda: group.all_gather(whole, part).wait(),
        "reduce_scatter": lambda: group.reduce_scatter(part, whole).wait(),
        "all_to_all": lambda: group.all_to_all(other, whole, splits, splits).wait(),
    }
    rows = []
    for name, call in calls.items():
        seconds = timed(call, device)
        rows.append({"collective": name, "bytes": received, "seconds": seconds, "bandwidth": received / seconds})
    return rows


def bandwidth_at(measured: Sequence[dict[str, Any]], name: str, size: float) -> float:
    """Measured bytes a second of a collective, at the size nearest to `size`."""
    rows = [row for row in measured if row["collective"] == name]
    return min(rows, key=lambda row: abs(row["bytes"] - size))["bandwidth"]


class SharedLayer:
    """A workload's layer over all ranks, of which this one has every N-th part of tokens and experts.

    Args:
        ranks: all of them.
        batches: whole operands of several calls, of the same weights.
        exchange: how tokens travel.
        own_first: whether a rank's own tokens are worked on meanwhile.
    """

    def __init__(self, ranks: Ranks, batches: Sequence[Operands], exchange: str, own_first: bool) -> None:
        whole = batches[0]
        n, rank, num_tokens = ranks.world.size, ranks.world.rank, len(whole.hidden_states)
        ends = [num_tokens * r // n for r in range(n + 1)]
        self.rows = slice(ends[rank], ends[rank + 1])
        self.padded = -(-num_tokens // n)
        placement = linear_placement(whole.global_num_experts, n)
        self.parallel = ParallelExperts(
            ranks, placement, max_tokens=self.padded, exchange=exchange, own_first=own_first
        )
        mine = placement.experts_of_rank[rank]
        part = slice(mine[0], mine[-1] + 1)
        self.experts = RoutedExperts(
            whole.w13[part], whole.w2[part], dtype=whole.hidden_states.dtype, activation=whole.activation
        )
        self.parallel.join(self.experts, whole.global_num_experts, whole.topk_ids.shape[1])
        self.whole = whole
        rows = self.rows
        self._batches = [
            Tokens(call.hidden_states[rows].contiguous(), call.topk_weights[rows], call.topk_ids[rows])
            for call in batches
        ]
        self._turns = itertools.cycle(self._batches)

    def run(self) -> torch.Tensor:
        """The rank's own tokens of the next batch through the layer."""
        return self._run(next(self._turns))

    def _run(self, tokens: Tokens) -> torch.Tensor:
        chosen = (tokens.topk_weights, tokens.topk_ids)
        return self.parallel.run(tokens.hidden_states, self.experts, lambda _: chosen, None, padded_tokens=self.padded)

    def stages(self, device: torch.device) -> dict[str, float]:
        """Median seconds of each step on the slowest rank, each one waited for: their sum is more than `run` takes."""
        exchange = self.parallel.exchange
        launched, received = self._dispatch()
        parts = [received] if launched.own is None else [launched.own, received]

        def work() -> list[torch.Tensor]:
            return [self.parallel.partial_sums(part, self.experts) for part in parts]

        *own, partial = work()
        return {
            "dispatch": timed(self._dispatch, device),
            "experts": timed(work, device),
            "combine": timed(lambda: exchange.combine(partial, received, own=own[0] if own else None), device),
        }

    def _dispatch(self) -> tuple[Launched, Received]:
        own_first, tokens = self.parallel.own_first, self._batches[0]
        launched = self.parallel.exchange.dispatch(tokens, self.padded, own_first=own_first, runs_beside=False)
        received = launched.wait()
        return launched, launched.again() or received

    def travelling(self) -> tuple[float, float]:
        """Bytes that this rank receives from the others on the way there, and on the way back."""
        x, ids = self._batches[0].hidden_states, self._batches[0].topk_ids
        row = x.shape[1] * x.element_size()
        top_k, others = ids.shape[1], self.parallel.mesh.world_size - 1
        if self.parallel.exchange_name == "all_gather":
            rows = there = self.padded * others
        else:
            ticket = self._dispatch()[1].ticket
            rank = self.parallel.ranks.rank
            there, rows = sum(ticket.received) - ticket.received[rank], sum(ticket.sent) - ticket.sent[rank]
        return there * (row + 8 * top_k), rows * row

    def judge(self) -> None:
        """Check the rank's output of each batch.

        Raises:
            RuntimeError: it is not within budget.
        """
        for tokens in self._batches:
            output = self._run(tokens)
            given = (tokens.hidden_states, self.whole.w13, self.whole.w2, tokens.topk_weights, tokens.topk_ids)
            verdict = verify_reduced(output, *given)
            if not verdict.holds:
                raise RuntimeError(f"{self.parallel.exchange_name}: {verdict.detail}")


def measure_layer(
    ranks: Ranks, workload: Workload, device: torch.device, collectives: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One device's layer, and both exchanges over all ranks, each with and without a rank's own tokens first."""
    bank = WeightBank(workload.model, workload.format, device)
    batches = [make_operands(workload, bank, call=call, weight_copy=0) for call in range(BATCHES)]
    whole = batches[0]
    one = timed(lambda: whole.pass_to(fused_experts), device)
    captured_one = timed_captured(lambda: whole.pass_to(fused_experts), device)
    rows = []
    for exchange, own_first in itertools.product(EXCHANGES, (False, True)):
        layer = SharedLayer(ranks, batches, exchange, own_first)
        layer.judge()
        seconds, stages = timed(layer.run, device), layer.stages(device)
        layer.judge()  # calls that are captured or replayed, too
        captured = timed_captured(layer.run, device) if exchange == "all_gather" else None
        there, back = layer.travelling()
        names = ("all_gather", "reduce_scatter") if exchange == "all_gather" else ("all_to_all", "all_to_all")
        wire = sum(
            size / bandwidth_at(collectives, name, size) for name, size in zip(names, (there, back), strict=True)
        )
        moved = stages["dispatch"] + stages["combine"]
        exposed = seconds - stages["experts"]
        rows.append(
            {
                "exchange": exchange,
                "own_first": own_first,
                "one_device": one,
                "seconds": seconds,
                "speedup": one / seconds,
                "captured_one_device": captured_one,
                "captured": captured,
                "captured_speedup": None if captured is None or captured_one is None else captured_one / captured,
                "stages": stages,
                "bytes": {"dispatch": there, "combine": back},
                "wire": wire,
                "communication": moved,
                "exposed": exposed,
                "allowed_communication": FACTOR * wire + FIXED,
            }
        )
    return rows


def _rank(rank: int, size: int, store: str, options: dict[str, Any], result: str) -> None:
    on_gpu = options["backend"] == "nccl"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(options["backend"], init_method=f"file://{store}", rank=rank, world_size=size)
    ranks = connect(Mesh(dp_size=size, ep_size=size))
    group = ProcessGroup("world")
    collectives = measure_collectives(group, device, options["megabytes"])
    model = find_model(options["model"])
    workload = Workload(model, options["tokens"], dtype=options["dtype"], cache_state="warm")
    layers = measure_layer(ranks, workload, device, collectives)
    if rank == 0:
        name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
        report = {
            "schema": SCHEMA,
            "device": f"{size} x {name}",
            "backend": options["backend"],
            "torch": torch.__version__,
            "workload": workload.id,
            "collectives": collectives,
            "layers": layers,
        }
        Path(result).write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks, and give what rank 0 wrote."""
    with tempfile.TemporaryDirectory(prefix="moegate-bench-") as folder:
        store, result = f"{folder}/store", f"{folder}/result.json"
        start_processes(_rank, (size, store, options, result), nprocs=size)
        return json.loads(Path(result).read_text())


def show(report: dict[str, Any], console: Console) -> None:
    """The report as tables."""
    console.print(f"{report['device']}, {report['backend']}, torch {report['torch']}: {report['workload']}")
    table = Table("collective", "MB received", "us", "GB/s")
    for row in report["collectives"]:
        cells = (row["bytes"] / 2**20, row["seconds"] * 1e6, row["bandwidth"] / 1e9)
        table.add_row(row["collective"], *(f"{cell:.1f}" for cell in cells))
    console.print(table)
    names = ("dispatch", "experts", "combine", "exposed", "wire", "allowed")
    heads = ("exchange", "one device, us", "layer, us", "speedup", *names, "captured, us", "one device's", "speedup")
    table = Table(*heads)
    for row in report["layers"]:
        stages = row["stages"]
        times = (*stages.values(), row["exposed"], row["wire"], row["allowed_communication"])
        table.add_row(
            row["exchange"] + (", own first" if row["own_first"] else ""),
            f"{row['one_device'] * 1e6:.1f}",
            f"{row['seconds'] * 1e6:.1f}",
            f"{row['speedup']:.2f}",
            *(f"{seconds * 1e6:.1f}" for seconds in times),
            *("-" if row[name] is None else f"{row[name] * 1e6:.1f}" for name in ("captured", "captured_one_device")),
            "-" if row["captured_speedup"] is None else f"{row['captured_speedup']:.2f}",
        )
    console.print(table)
    console.print(
        f"exposed: the layer without its experts, who work while tokens travel; wire: bytes over the measured "
        f"bandwidth; allowed for communication and permutation: {FACTOR} x wire + {FIXED * 1e6:.0f} us; captured: "
        f"replayed from a CUDA graph"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes as `moegate bench`: 0 measured, 3 nothing to measure on, 4 bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m moegate.bench.parallel", description=__doc__)
    parser.add_argument("--ranks", type=int, help="default: one for each GPU")
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl")
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=8192, help="M, of all ranks together (default: 8192)")
    parser.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32")
    parser.add_argument("--megabytes", type=int, nargs="+", default=list(MEGABYTES))
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    size = torch.cuda.device_count() if options.ranks is None else options.ranks
    try:
        find_model(options.model)
        if find_format(options.dtype).is_quantized:
            raise ValueError(f"dtype: expected bf16, fp16 or fp32, got {options.dtype!r}")
        if options.backend == "nccl" and size > torch.cuda.device_count():
            raise ValueError(f"ranks: expected at most {torch.cuda.device_count()} GPUs, got {size}")
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 4
    if size < 2:
        print(f"{parser.prog}: needs two ranks, and a GPU for each with nccl; there are {size}", file=sys.stderr)
        return 3
    names = ("backend", "model", "tokens", "dtype", "megabytes")
    report = measure(size, {name: getattr(options, name) for name in names})
    show(report, PlainConsole(width=160))
    if options.json:
        write_whole(options.json, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
