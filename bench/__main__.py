"""`python -m moegate.bench`: time models' layers, beside peers if given, and print a table."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from rich.console import Console

from ..conformance.console import PlainConsole, wide_console
from ..impl.whole_file import expect_writable, write_whole
from . import overlap_report
from .ep_model import ASSUMPTIONS, Link, as_table, estimate, parse_ranks, share_of_rank, whole_layer
from .ep_model import as_json as model_as_json
from .formats import FORMATS
from .gate.timed_subject import TimedSubject
from .installed_peers import NAMES
from .layers import LAYERS, choose_layers
from .lora import extra_times
from .overlap_runner import GPU_TOKENS, run_overlap
from .report import as_json, run_table
from .selection import choose_device, parse_counts, select_workloads, split_words
from .session import EXIT_BAD_ARGUMENTS, EXIT_MEASURED, EXIT_NOTHING, EXIT_WRONG, OURS, LayerBench, Run, run_workloads
from .workloads import LoraOptions, Workload


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_BAD_ARGUMENTS, f"{self.prog}: {message}\n")


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = _Parser(prog="moegate bench", description="Time models' layers, beside peers if given, and print a table.")
    parser.add_argument("--models", help="names, comma-separated; default: every model this machine can run")
    parser.add_argument("--tokens", help="numbers of tokens M, comma-separated; default: 1,8,64,512,4096 (CPU: 1,64)")
    parser.add_argument("--routing", default="uniform", help="uniform, zipf<exponent>, all-to-one; comma-separated")
    parser.add_argument("--dtype", help=f"{', '.join(FORMATS)}; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--subject", default=OURS, metavar="FILE.py:CLASS", help="your own layer instead of moegate's")
    peers = f"another fused_experts beside it, or an engine installed here ({', '.join(NAMES)}); may be repeated"
    parser.add_argument("--peer", action="append", default=[], metavar="FILE.py:CALLABLE", help=peers)
    parser.add_argument("--fixed-ceilings", action="store_true", help="use the fixed H200 ceilings for the floors")
    parser.add_argument("--budget", type=float, default=0.6, help="seconds of samples for each workload")
    parser.add_argument(
        "--overlap",
        action="store_true",
        help=f"time whole layers with their shared experts on one stream and on two: {', '.join(LAYERS)}",
    )
    parser.add_argument("--lora", type=int, metavar="RANK", help="also time the layer with LoRA adapters of this rank")
    parser.add_argument("--adapters", type=int, default=8, help="adapters over the batch, with --lora; default: 8")
    parser.add_argument("--simulate-ep", metavar="N,N", help="model layers over N ranks (2 to 256) of this device")
    parser.add_argument(
        "--link-bandwidth", type=float, metavar="GB/s", help="of each rank and direction, for the model"
    )
    parser.add_argument("--link-latency", type=float, metavar="us", help="of one step, for the model")
    parser.add_argument("--json", metavar="FILE", help="write the records; - is standard output")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. The exit code is 0: measured, 1: something is wrong, 3: nothing measured, 4: bad arguments."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.json is not None and options.json != "-":
        try:
            expect_writable("--json", options.json)
        except ValueError as error:
            parser.error(str(error))
    if not 0 < options.budget < math.inf:
        parser.error(f"--budget: expected a number of seconds above 0, got {options.budget}")
    to_stdout = options.json == "-"
    console = wide_console(stderr=to_stdout, log_width=200)
    if options.subject != OURS:
        for name in ("overlap", "lora", "simulate_ep"):
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')}: expected none with --subject: it times moegate's own layers")
    if options.overlap:
        return _overlap(parser, options, console)
    try:
        device = choose_device(options.device)
        workloads = select_workloads(
            device, models=options.models, tokens=options.tokens, routings=options.routing, dtype=options.dtype
        )
        simulation = _simulation(options)
        subject = TimedSubject(options.subject)
        bench = LayerBench(
            device,
            peers=options.peer,
            ours=subject.experts,
            name=options.subject,
            verify=subject.verify,
            fixed_ceilings=options.fixed_ceilings,
            budget=options.budget,
            lora=None if options.lora is None else LoraOptions(options.lora, options.adapters),
        )
    except ValueError as error:
        parser.error(str(error))
    if simulation is not None:
        try:
            return simulate(bench, [w for w in workloads if w.lora is None], *simulation, console, options.json)
        except ValueError as error:
            parser.error(str(error))
    run = run_workloads(
        bench, workloads, PlainConsole(stderr=True), lambda workload: subject.unsupported(workload, device)
    )
    if run.records:
        console.print(run_table(run))
        machine, ceilings = run.records[0].machine, bench.ceilings(workloads[0].dtype)
        peaks = ", ".join(f"{peak / 1e12:.3g} TFLOP/s {dtype}" for dtype, peak in ceilings.peak.items())
        console.print(
            f"{machine.device}, driver {machine.driver or '-'}, torch {machine.torch}, triton {machine.triton}"
        )
        for line in extra_times(run.records):
            console.print(line, markup=False)
        console.print(f"floors: {ceilings.read_bandwidth / 1e9:.0f} GB/s, {peaks} ({ceilings.source})")
    _print_untimed(console, run)
    _write(options.json, as_json(run))
    return run.exit_code


def _print_untimed(console: Console, run: Run) -> None:
    for workload, subject, reason in run.failures:
        console.print(f"not timed: {subject} on {workload}: {reason}", markup=False, soft_wrap=True)
    for workload, reason in run.skipped:
        console.print(f"skipped: {workload}: {reason}", markup=False, soft_wrap=True)


def _simulation(options: argparse.Namespace) -> tuple[list[int], Link] | None:
    """The numbers of ranks and the link of the model; None where none is asked for."""
    stated = (options.link_bandwidth, options.link_latency)
    if options.simulate_ep is None:
        if stated != (None, None):
            raise ValueError("link-bandwidth, link-latency: expected beside simulate-ep alone")
        return None
    if None in stated:
        raise ValueError(
            "simulate-ep: expected link-bandwidth and link-latency beside it: a model has to know the link"
        )
    return parse_ranks(options.simulate_ep), Link(options.link_bandwidth * 1e9, options.link_latency * 1e-6)


def simulate(
    bench: LayerBench,
    workloads: Sequence[Workload],
    ranks: Sequence[int],
    link: Link,
    console: Console,
    file: str | None,
) -> int:
    """Measure one device's layers and one rank's shares, and print what the model makes of them.

    Raises:
        ValueError: more ranks than experts.
    """
    shares = {(w, n): share_of_rank(w, n) for w in workloads for n in ranks}
    wholes = {w: whole_layer(w) for w in workloads}
    run = run_workloads(bench, list(dict.fromkeys([*wholes.values(), *shares.values()])), PlainConsole(stderr=True))
    seconds = {record.workload: record.timing.median for record in run.records if record.subject == OURS}
    estimates = []
    for (workload, n), share in shares.items():
        if share.id in seconds and wholes[workload].id in seconds:
            times = {"share": seconds[share.id], "one_device": seconds[wholes[workload].id]}
            estimates += estimate(wholes[workload], n, link, **times)
    if estimates:
        console.print(as_table(estimates, link))
        for assumption in ASSUMPTIONS:
            console.print(f"assumed: {assumption}", markup=False, soft_wrap=True)
    _print_untimed(console, run)
    _write(file, model_as_json(estimates, link))
    return run.exit_code


def _overlap(parser: argparse.ArgumentParser, options: argparse.Namespace, console: Console) -> int:
    """`--overlap`, which needs a GPU and chooses routings and dtypes itself."""
    for name in ("dtype", "peer", "fixed_ceilings"):
        if getattr(options, name):
            parser.error(f"--{name.replace('_', '-')}: expected none with --overlap")
    try:
        device = choose_device(options.device)
        layers = choose_layers(None if options.models is None else split_words(options.models, "models"))
        tokens = GPU_TOKENS if options.tokens is None else parse_counts(options.tokens)
    except ValueError as error:
        parser.error(str(error))
    if device.type != "cuda":
        console.print(f"nothing measured: two streams need a GPU, and this is {device}")
        return EXIT_NOTHING
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    cells, failures = run_overlap(
        layers, tokens, device, budget=options.budget, progress_console=PlainConsole(stderr=True)
    )
    if cells:
        console.print(overlap_report.overlap_table(cells))
        for line in overlap_report.summary(cells):
            console.print(line, markup=False, soft_wrap=True)
    for layer, num_tokens, reason in failures:
        console.print(f"not timed: {layer} at M = {num_tokens}: {reason}", markup=False, soft_wrap=True)
    _write(options.json, overlap_report.as_json(cells, failures))
    return EXIT_WRONG if failures else EXIT_MEASURED if cells else EXIT_NOTHING


def _write(file: str | None, data: dict[str, Any]) -> None:
    if file is None:
        return
    text = json.dumps(data, indent=1)
    if file == "-":
        print(text)
    else:
        write_whole(file, text + "\n")


if __name__ == "__main__":
    sys.exit(main())
