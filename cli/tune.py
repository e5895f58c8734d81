"""`moegate tune`: search tiles for a model's layers on this device, and write the files that the lookup reads."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moegate import exit_codes
from moegate.conformance.console import wide_console
from moegate.json_output import expect_json_file, put_json

if TYPE_CHECKING:
    from moegate.bench.tune import TuneRun
    from moegate.bench.workloads import Model, Workload

SCHEMA = 1
DTYPES = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "fp8-block": "fp8-block",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}
_SHAPE = re.compile(r"E=(\d+),N=(\d+),H=(\d+),top_k=(\d+)")


def tune(
    model: Annotated[list[str] | None, typer.Option(help="A model's name. May be repeated.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A layer E=...,N=...,H=...,top_k=... as the lookup's warning gives it. May be repeated."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens M, comma-separated; 1 to 8192 in powers of two.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32 or fp8-block.")] = "bf16",
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    minutes: Annotated[float | None, typer.Option(help="Begin nothing new after so many minutes.")] = None,
    limit: Annotated[int | None, typer.Option(help="Candidates of each GEMM at most, drawn with a fixed seed.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the tuned files; MOEGATE_TUNED_CONFIG_FOLDER, else ./tuned, where left out."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure also what the files have already.")] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write every trial as JSON; - is standard output.")
    ] = None,
) -> None:
    """Search the grouped GEMM's tiles for models' layers on this device, and write them to tuned files.

    A run that is interrupted or out of time goes on where it stopped. Exit codes: 0 tuned, or nothing better than the
    default found; 3 nothing could be measured; 4 bad arguments.
    """
    console = wide_console(stderr=json_file == "-")
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        _refuse(console, f"--minutes: expected more than 0, got {minutes:g}")
    if limit is not None and limit < 1:
        _refuse(console, f"--limit: expected at least 1, got {limit}")
    expect_json_file(console, "tune", json_file)
    folder = _folder(console, output)
    workloads = _workloads(console, model or [], shape or [], tokens, dtype)
    run, machine = _run(console, workloads, device, folder, minutes, limit, again)

    is_written = put_json(console, "tune", json_file, _report(run, machine, folder), indent=1)
    if json_file != "-":
        _print(console, run)
    is_done = is_written and (run.tuned or (run.kept and not run.failed))
    raise typer.Exit(exit_codes.HOLDS if is_done else exit_codes.NOTHING_DONE)


def _refuse(console: Console, message: str) -> NoReturn:
    console.print(f"moegate tune: {message}", markup=False, style="red", soft_wrap=True)
    raise typer.Exit(exit_codes.BAD_ARGUMENTS)


def _nothing(console: Console, message: str) -> NoReturn:
    console.print(f"moegate tune: {message}", markup=False, style="red", soft_wrap=True)
    raise typer.Exit(exit_codes.NOTHING_DONE)


def _folder(console: Console, output: Path | None) -> Path:
    import os

    from moegate.impl.whole_file import expect_writable

    folder = output or Path(os.environ.get("MOEGATE_TUNED_CONFIG_FOLDER") or "tuned")
    try:
        expect_writable("--output", folder / "probe.json", make_folders=True)
    except ValueError as error:  # a NUL in the name among them
        _refuse(console, f"--output: expected a folder that can be written, got {str(folder)!a:.300}: {error}")
    return folder


def _workloads(
    console: Console, models: Sequence[str], shapes: Sequence[str], tokens: str | None, dtype: str
) -> list[Workload]:
    from moegate.bench.tune import DEFAULT_TOKENS, unsearchable
    from moegate.bench.workloads import MODELS, Workload

    if not models and not shapes:
        _refuse(console, f"--model: expected at least one of {', '.join(MODELS)}, or a --shape")
    if dtype not in DTYPES:
        _refuse(console, f"--dtype: expected bf16, fp16, fp32 or fp8-block, got {dtype!r}: other kernels are not tuned")
    chosen: list[Model] = []
    for name in models:
        if name not in MODELS:
            _refuse(console, f"--model: expected one of {', '.join(MODELS)}, got {name!r}")
        if why := unsearchable(MODELS[name]):
            _refuse(console, f"--model: {name}: {why}")
        chosen.append(MODELS[name])
    chosen += [_shape(console, shape) for shape in shapes]
    counts = DEFAULT_TOKENS
    if tokens is not None:
        words = [word.strip() for word in tokens.split(",")]
        if not all(word.isascii() and word.isdecimal() and 1 <= int(word[:12]) <= 2**20 for word in words):
            _refuse(console, f"--tokens: expected numbers in [1, {2**20}] such as 1,8,64, got {tokens!r}")
        counts = tuple(int(word) for word in words)
    workloads = [Workload(model, count, dtype=DTYPES[dtype]) for model in chosen for count in counts]
    return list(dict.fromkeys(workloads))


def _shape(console: Console, text: str) -> Model:
    from moegate.bench.workloads import Model

    match = _SHAPE.fullmatch(text)
    if match is None:
        _refuse(console, f"--shape: expected E=...,N=...,H=...,top_k=..., got {text!r}")
    experts, intermediate, hidden, top_k = (int(number) for number in match.groups())
    try:
        return Model(text, experts, top_k, hidden, intermediate, "the command line")
    except ValueError as error:
        _refuse(console, f"--shape: {error}")


def _run(
    console: Console,
    workloads: list[Workload],
    device: str,
    folder: Path,
    minutes: float | None,
    limit: int | None,
    again: bool,
) -> tuple[TuneRun, dict[str, str]]:
    import torch
    import triton

    from moegate.bench.selection import choose_device
    from moegate.bench.tune import tune as tune_workloads
    from moegate.bench.tune_device import Remote
    from moegate.impl.platform import Platform
    from moegate.impl.tuning.schema import TunedConfigError

    if device.split(":", maxsplit=1)[0] == "cuda" and not torch.cuda.is_available():
        _nothing(console, f"--device {device}: torch sees no GPU here")
    try:
        where = choose_device(device)
    except ValueError as error:
        _refuse(console, f"--device: {error}")
    if where.type != "cuda":
        _nothing(console, f"--device {device}: the kernels that are tuned run on a GPU")
    platform = Platform.of(where)
    machine = {"device": platform.name, "torch": torch.__version__, "triton": triton.__version__}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True)
    try:
        with Remote(where) as bench, bar:
            run = tune_workloads(
                workloads,
                bench=bench,
                platform=platform,
                folder=folder,
                triton_version=triton.__version__,
                minutes=minutes,
                limit=limit,
                again=again,
                watcher=_watcher(console, bar),
            )
    except TunedConfigError as error:
        _refuse(console, f"--output: {error}")
    except OSError as error:
        _refuse(console, f"--output: {error}")
    except KeyboardInterrupt:
        _nothing(console, f"interrupted; what is tuned is in {folder}, and the same command goes on from there")
    return run, machine


def _watcher(console: Console, bar: Progress) -> Any:
    from moegate.bench.tune import Tuned, Watcher

    class Bar(Watcher):
        def __init__(self) -> None:
            self._task = bar.add_task("tuning", total=None)

        def plan(self, steps: int) -> None:
            bar.update(self._task, total=steps)

        def step(self) -> None:
            bar.advance(self._task)

        def phase(self, what: str) -> None:
            bar.update(self._task, description=what)

        def done(self, tuned: Tuned) -> None:
            said = tuned.about()
            default = "failed" if said["default_us"] is None else f"{said['default_us']} us"
            console.print(
                f"{said['model']} M={tuned.workload.num_tokens}: default {default}, best {said['best_us']} us, "
                f"{said['taken']} taken ({said['candidates']} candidates, {said['failed']} failed)",
                highlight=False,
            )

    return Bar()


def _report(run: TuneRun, machine: dict[str, str], folder: Path) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        **machine,
        "folder": str(folder),
        "files": [str(file) for file in run.files],
        "tuned": [tuned.as_dict() for tuned in run.tuned],
        "kept": [workload.id for workload in run.kept],
        "failed": [{"workload": workload.id, "reason": reason} for workload, reason in run.failed],
        "left": [workload.id for workload in run.left],
    }


def _print(console: Console, run: TuneRun) -> None:
    if run.tuned:
        table = Table(box=None, pad_edge=False)
        for name in ("model", "M", "default us", "best us", "gain", "taken", "w13", "w2"):
            table.add_column(name, justify="right" if name in ("M", "default us", "best us", "gain") else "left")
        for tuned in run.tuned:
            default = tuned.default_seconds
            table.add_row(
                tuned.workload.model.name,
                str(tuned.workload.num_tokens),
                "-" if default is None else f"{default * 1e6:.2f}",
                f"{tuned.best_seconds * 1e6:.2f}",
                "-" if default is None else f"{default / tuned.best_seconds - 1:.1%}",
                "best" if tuned.is_better else "default",
                *(_tile(tile) for tile in tuned.pair),
            )
        console.print(table)
    failures: dict[str, int] = {}
    for tuned in run.tuned:
        for trial in tuned.failed:
            failures[trial.error] = failures.get(trial.error, 0) + 1
    for error, count in failures.items():
        console.print(f"candidates left out ({count}): {error}", markup=False, highlight=False, soft_wrap=True)
    for workload, reason in run.failed:
        name = f"{workload.model.name} M={workload.num_tokens}"
        console.print(f"nothing measured: {name}: {reason}", markup=False, style="red", soft_wrap=True)
    if run.kept:
        console.print(f"already tuned: {len(run.kept)} (--again measures them once more)", highlight=False)
    if run.left:
        names = ", ".join(f"{workload.model.name} M={workload.num_tokens}" for workload in run.left)
        console.print(f"no time was left for: {names}; the same command goes on there", highlight=False)
    for file in run.files:
        console.print(f"written: {file}", markup=False, highlight=False, soft_wrap=True)


def _tile(tile: Any) -> str:
    swap = " swap" if tile.swap_ab else ""
    group = f" g{tile.group_size_m}" if tile.group_size_m > 1 else ""
    blocks = f"{tile.block_size_m}x{tile.block_size_n}x{tile.block_size_k}"
    return f"{blocks} w{tile.num_warps} s{tile.num_stages}{group}{swap}"
