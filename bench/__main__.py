"""`python -m moegate.bench`: time models' layers, beside peers if given, and print a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from .formats import FORMATS
from .lora import LoraOptions, extra_times
from .report import as_json, run_table
from .selection import choose_device, select_workloads
from .session import EXIT_BAD_ARGUMENTS, LayerBench, run_workloads


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_BAD_ARGUMENTS, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. The exit code is 0: measured, 1: something is wrong, 3: nothing measured, 4: bad arguments."""
    parser = _Parser(prog="moegate bench", description="Time models' layers, beside peers if given, and print a table.")
    parser.add_argument("--models", help="names, comma-separated; default: every model this machine can run")
    parser.add_argument("--tokens", help="numbers of tokens M, comma-separated; default: 1,8,64,512,4096 (CPU: 1,64)")
    parser.add_argument("--routing", default="uniform", help="uniform, zipf<exponent>, all-to-one; comma-separated")
    parser.add_argument("--dtype", help=f"{', '.join(FORMATS)}; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--peer", action="append", default=[], metavar="FILE.py:CALLABLE", help="may be repeated")
    parser.add_argument("--fixed-ceilings", action="store_true", help="use the fixed H200 ceilings for the floors")
    parser.add_argument("--budget", type=float, default=0.6, help="seconds of samples for each workload")
    parser.add_argument("--lora", type=int, metavar="RANK", help="also time the layer with LoRA adapters of this rank")
    parser.add_argument("--adapters", type=int, default=8, help="adapters over the batch, with --lora; default: 8")
    parser.add_argument("--json", metavar="FILE", help="write the records; - is standard output")
    options = parser.parse_args(arguments)
    to_stdout = options.json == "-"
    console = Console(stderr=to_stdout)
    if not console.is_terminal:
        # A log has no width of its own, and a table cut off at 80 columns says nothing.
        console = Console(stderr=to_stdout, width=200)
    try:
        device = choose_device(options.device)
        workloads = select_workloads(
            device, models=options.models, tokens=options.tokens, routings=options.routing, dtype=options.dtype
        )
        bench = LayerBench(
            device,
            peers=options.peer,
            fixed_ceilings=options.fixed_ceilings,
            budget=options.budget,
            lora=None if options.lora is None else LoraOptions(options.lora, options.adapters),
        )
    except ValueError as error:
        parser.error(str(error))
    run = run_workloads(bench, workloads, Console(stderr=True))
    if run.records:
        console.print(run_table(run))
        machine, ceilings = run.records[0].machine, bench.ceilings(run.records[0].dtype)
        peaks = ", ".join(f"{peak / 1e12:.3g} TFLOP/s {dtype}" for dtype, peak in ceilings.peak.items())
        console.print(
            f"{machine.device}, driver {machine.driver or '-'}, torch {machine.torch}, triton {machine.triton}"
        )
        for line in extra_times(run.records):
            console.print(line, markup=False)
        console.print(f"floors: {ceilings.read_bandwidth / 1e9:.0f} GB/s, {peaks} ({ceilings.source})")
    for workload, subject, reason in run.failures:
        console.print(f"not timed: {subject} on {workload}: {reason}", markup=False, soft_wrap=True)
    for workload, reason in run.skipped:
        console.print(f"skipped: {workload}: {reason}", markup=False, soft_wrap=True)
    if options.json:
        text = json.dumps(as_json(run), indent=1)
        if to_stdout:
            print(text)
        else:
            Path(options.json).write_text(text + "\n")
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
