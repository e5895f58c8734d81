"""What an eager call of a whole layer costs the host: `python -m moegate.bench.launch_overhead`.

The clock runs while calls are enqueued and stops before the device is waited for, so few calls are made at a time that
the queue never fills. The layer as it stands and its replays (`impl.replay`) take turns; both give the same bits first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..impl.layer import RoutingMethod
from ..impl.replay import replaying
from ..impl.whole_file import write_whole
from .formats import find_format
from .layers import LayerBank, LayerModel, hidden_states_of
from .machine import describe_machine
from .selection import parse_counts, split_words
from .timer import synchronise
from .workloads import find_model

CALLS, ROUNDS = 10, 150
AS_IT_STANDS, REPLAYED = "as it stands", "replayed"
Row = dict[str, Any]


def host_seconds(run: Callable[[], Any], device: torch.device, calls: int = CALLS) -> float:
    """Seconds of the host to enqueue one call, of `calls` in a row on an idle device."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = (time.perf_counter() - started) / calls
    synchronise(device)
    return seconds


def measure(model: str, num_tokens: int, device: torch.device, dtype: str = "bf16", rounds: int = ROUNDS) -> list[Row]:
    """The layer's two ways in turns.

    Raises:
        AssertionError: they do not give the same bits.
    """
    routed = find_model(model)
    layer_model = LayerModel(routed, dtype, RoutingMethod(routed.top_k), shared_size=routed.intermediate_size)
    layer = LayerBank(layer_model, device).routed_alone(0, 0)
    x = hidden_states_of(layer_model, num_tokens, 0, device)
    samples: dict[str, list[float]] = {AS_IT_STANDS: [], REPLAYED: []}
    with torch.inference_mode():
        with replaying(None):
            expected = layer(x)
        with replaying(after=0):
            layer(x)  # is recorded
            if not torch.equal(layer(x), expected):
                raise AssertionError(f"{model}, M = {num_tokens}: a replay gives other bits than the call")
        for _ in range(rounds):
            with replaying(None):
                samples[AS_IT_STANDS].append(host_seconds(lambda: layer(x), device))
            with replaying(after=0):
                samples[REPLAYED].append(host_seconds(lambda: layer(x), device))
    return [
        {
            "model": model,
            "num_tokens": num_tokens,
            "dtype": dtype,
            "way": way,
            "median": statistics.median(seconds),
            "least": min(seconds),
            "ninth_decile": statistics.quantiles(seconds, n=10)[-1] if len(seconds) > 1 else seconds[0],
        }
        for way, seconds in samples.items()
    ]


def show(rows: Sequence[Row], console: Console) -> None:
    """A table in microseconds."""
    table = Table("model", "M", "dtype", "way", title="host time of an eager layer, us a call")
    for column in ("median", "least", "9th decile"):
        table.add_column(column, justify="right")
    for row in rows:
        times = (f"{1e6 * row[name]:.1f}" for name in ("median", "least", "ninth_decile"))
        table.add_row(row["model"], str(row["num_tokens"]), row["dtype"], row["way"], *times)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes as `moegate bench`: 0 measured, 3 nothing to measure on, 4 bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m moegate.bench.launch_overhead", description=__doc__)
    parser.add_argument("--models", default="qwen3-30b-a3b,deepseek-v3-tp8", help="names, with commas between")
    parser.add_argument("--tokens", default="1,64", help="numbers of tokens, with commas between")
    parser.add_argument("--dtype", default="bf16", help="how experts are stored")
    parser.add_argument("--json", metavar="FILE", help="write what was measured")
    asked = parser.parse_args(arguments)
    try:
        models, tokens = split_words(asked.models, "models"), parse_counts(asked.tokens)
        for name in models:
            find_model(name)
        find_format(asked.dtype)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 4
    if not torch.cuda.is_available():
        print("nothing was measured: torch sees no GPU here", file=sys.stderr)
        return 3
    device = torch.device("cuda")
    rows: list[Row] = []
    for model in models:
        for num_tokens in tokens:
            rows += measure(model, num_tokens, device, asked.dtype)
            torch.cuda.empty_cache()
    show(rows, Console())
    if asked.json:
        report = {"machine": asdict(describe_machine(device)), "rows": rows}
        write_whole(asked.json, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
