"""`moegate check`: the conformance suite with a progress bar, a table and JSON."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from moegate import exit_codes
from moegate.conformance.console import wide_console
from moegate.conformance.gpu_watch import GpuWatch, visible_gpus
from moegate.conformance.report_formats import as_junit, as_markdown, known_lines, used_text
from moegate.conformance.selection import PROFILES
from moegate.json_output import expect_output, put_json, put_text

# Each is a process that imports torch.
MOST_WORKERS = 512
MOST_RERUNS = 1_000_000
# pytest's exit code.
INTERRUPTED = 2


def check(
    subject: Annotated[
        str,
        typer.Option(
            help="Implementation under test: moegate, torch, transformers, vllm, sglang, flashinfer, or FILE.py:CLASS; "
            "each with :VARIANT for one of its variants."
        ),
    ] = "moegate",
    device: Annotated[str, typer.Option(help="auto, cpu (Triton's interpreter) or cuda.")] = "auto",
    profile: Annotated[str, typer.Option(help="gate (the same cases everywhere), nightly or soak.")] = "gate",
    workers: Annotated[
        int, typer.Option("--workers", "-n", help="Processes; 0: one a core, at most 8 on one GPU.")
    ] = 0,
    scale: Annotated[float, typer.Option(help="Multiplies the number of cases.")] = 1.0,
    minutes: Annotated[
        float | None, typer.Option(help="With --profile soak: so long, in batches of random cases.")
    ] = None,
    reruns: Annotated[
        int | None, typer.Option(help="Only call a fixed set of cases so many times more each: no bit may change.")
    ] = None,
    spec: Annotated[str | None, typer.Option(help="Run this one spec, as a failure printed it.")] = None,
    select: Annotated[
        str | None, typer.Option("--select", "-k", help="Run the tests whose names match (pytest -k).")
    ] = None,
    emit_repro: Annotated[
        str | None, typer.Option(help="Write the first finding as FILE.py, a script that runs without moegate.")
    ] = None,
    isolate: Annotated[
        bool, typer.Option(help="Run the subject in a process of its own: a crash or a hang ends one case.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for a call of an isolated subject.")] = 120.0,
    subject_python: Annotated[
        str | None, typer.Option(help="Isolate the subject under this Python, with the packages that it has.")
    ] = None,
    known: Annotated[
        str | None, typer.Option(help="A file of known failures (TOML), beside those that ship with moegate.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write the result as JSON; - is standard output.")
    ] = None,
    junit: Annotated[str | None, typer.Option(help="Write the result as JUnit XML.")] = None,
    markdown: Annotated[str | None, typer.Option(help="Write the result as Markdown, for a pull request.")] = None,
) -> None:
    """Judge a Mixture-of-Experts implementation by the properties of the suite.

    Exit codes: 0 all hold, 1 a finding, 2 interrupted, or a GPU was lost or slowed itself down, 3 nothing could be
    judged, 4 bad arguments.
    """
    console = wide_console(stderr=json_file == "-")
    if profile not in PROFILES:
        _refuse(console, f"--profile: expected one of {', '.join(PROFILES)}, got {profile!r}")
    if device not in ("auto", "cpu", "cuda"):
        _refuse(console, f"--device: expected auto, cpu or cuda, got {device!r}")
    if not 0 < scale < math.inf:
        _refuse(console, f"--scale: expected a number above 0, got {scale}")
    if minutes is not None and not 0 < minutes < math.inf:
        _refuse(console, f"--minutes: expected a number above 0, got {minutes}")
    if minutes is not None and profile != "soak":
        _refuse(console, f"--minutes: expected --profile soak beside it, got {profile}")
    if reruns is not None and not 1 <= reruns <= MOST_RERUNS:
        _refuse(console, f"--reruns: expected a number in [1, {MOST_RERUNS}], got {reruns}")
    if reruns is not None and minutes is not None:
        _refuse(console, "--reruns: expected no --minutes beside it: a fixed set of cases has its own end")
    if not 0 <= workers <= MOST_WORKERS:
        _refuse(console, f"--workers: expected a number in [0, {MOST_WORKERS}], got {workers}")
    for option, file in (("--json", json_file), ("--junit", junit), ("--markdown", markdown)):
        expect_output(console, "check", option, file)
    if emit_repro is not None:
        if not emit_repro.endswith(".py"):
            _refuse(console, f"--emit-repro: expected a file that ends in .py, got {emit_repro!r}")
        expect_output(console, "check", "--emit-repro", emit_repro)
    if not 0 < timeout < math.inf:
        _refuse(console, f"--timeout: expected a number above 0, got {timeout}")
    if subject_python is not None and shutil.which(subject_python) is None:
        _refuse(console, f"--subject-python: expected an interpreter, got {subject_python!r}")
    device = _resolve(device, console)
    _expect_readable(console, spec, known)
    workers = workers or (1 if spec else min(os.cpu_count() or 1, 8))

    with tempfile.TemporaryDirectory(prefix="moegate-") as folder:
        report_file, progress_file = Path(folder, "report.json"), Path(folder, "progress")
        progress_file.touch()
        command = [sys.executable, "-m", "pytest", "--pyargs", "moegate.conformance", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "no:benchmark", "--tb=short", "--no-header", "--import-mode=importlib"]
        command += [f"--moegate-{name}={value}" for name, value in (("subject", subject), ("device", device))]
        command += [f"--moegate-profile={profile}", f"--moegate-scale={scale}"]
        command += [f"--moegate-report={report_file}", f"--moegate-progress={progress_file}"]
        command += [f"--moegate-spec={spec}"] if spec else []
        command += [f"--moegate-minutes={minutes}"] if minutes is not None else []
        command += [f"--moegate-reruns={reruns}"] if reruns is not None else []
        command += [f"--moegate-known={known}"] if known else []
        command += ["--moegate-isolate", f"--moegate-timeout={timeout}"] if isolate or subject_python else []
        command += [f"--moegate-emit-repro={emit_repro}"] if emit_repro else []
        command += [f"--moegate-python={subject_python}"] if subject_python else []
        command += ["-k", select] if select else []
        command += ["-n", str(workers)] if workers > 1 else []
        environment = dict(os.environ)
        # A process has one Triton mode, read when Triton is imported: it is set here, for the child alone.
        environment["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
        if device == "cpu":
            # Small operands: threads would only get in each other's way, and the workers take the cores.
            environment.setdefault("OMP_NUM_THREADS", "1")
        if device == "cuda" and reruns is None and not (isolate or subject_python):
            _precompile(subject, workers, environment, console)
        watch = GpuWatch.of_this_machine(_gpus() if device == "cuda" else [])
        started = time.monotonic()
        output, status = _run(command, environment, folder, progress_file, console, watch.look)
        seconds = time.monotonic() - started
        report = json.loads(report_file.read_text()) if report_file.exists() else None

    if report is None or status == exit_codes.BAD_ARGUMENTS:
        console.print(output, markup=False, highlight=False)
        # pytest's usage errors (4) are ours; whatever else left no report judged nothing.
        raise typer.Exit(exit_codes.BAD_ARGUMENTS if status == 4 else exit_codes.NOTHING_DONE)
    report["seconds"] = round(seconds, 1)
    report["inconclusive"] += watch.complaints()
    # A GPU that went or slowed itself down explains errors, and no wrong numbers.
    if report["inconclusive"] and report["verdict"] != "violated":
        report["verdict"] = "inconclusive"
    is_written = put_json(console, "check", json_file, report)
    for option, path, text in (("--junit", junit, as_junit), ("--markdown", markdown, as_markdown)):
        is_written &= path is None or put_text(console, "check", option, path, text(report))
    _print(report, status, output, console)
    if emit_repro:
        notes = [line for line in output.splitlines() if line.startswith(emit_repro)]
        console.print("\n".join(notes), markup=False, highlight=False, soft_wrap=True)
    code = _exit_code(report, status)
    raise typer.Exit(code if is_written or code == exit_codes.FINDING else exit_codes.NOTHING_DONE)


def _refuse(console: Console, message: str) -> None:
    console.print(f"moegate check: {message}", markup=False, style="red")
    raise typer.Exit(exit_codes.BAD_ARGUMENTS)


def _expect_readable(console: Console, spec: str | None, known: str | None) -> None:
    """Refuse here what a child would refuse seconds later."""
    from moegate.conformance.known import load_known
    from moegate.conformance.spec import parse_spec

    for option, read in (
        ("--spec", lambda: None if spec is None else parse_spec(spec)),
        ("--known", lambda: load_known(known)),
    ):
        try:
            read()
        except (ValueError, OSError) as error:
            _refuse(console, f"{option}: {error}")


def _resolve(device: str, console: Console) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        console.print("moegate check: --device cuda: torch sees no GPU here", style="red")
        raise typer.Exit(exit_codes.NOTHING_DONE)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _gpus() -> list[str]:
    import torch

    return visible_gpus(torch.cuda.device_count())


def _precompile(subject: str, workers: int, environment: dict[str, str], console: Console) -> None:
    """Compile the kernels of the suite's shapes in parallel, so that no worker waits for another's compilation."""
    started = time.monotonic()
    with console.status(f"compiling kernels in {workers} processes"):
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "moegate.conformance.precompile", subject, str(part), str(workers)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for part in range(workers)
        ]
        counts = [json.loads(out) if (out := child.communicate()[0]).strip() else {} for child in children]
    compiled = len({variant for count in counts for variant in count})
    seconds = time.monotonic() - started
    console.print(f"compiled {compiled} kernel variants in {seconds:.0f} s, {workers} processes")


def _run(
    command: list[str],
    environment: dict[str, str],
    folder: str,
    progress_file: Path,
    console: Console,
    look: Callable[[], None] = lambda: None,
) -> tuple[str, int]:
    log = Path(folder, "log")
    rate = TaskProgressColumn(show_speed=True)  # executions a second, where nobody knows how many are to come
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeElapsedColumn())
    with log.open("w") as sink, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("executions", total=None)
        child = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            while child.poll() is None:
                # The suite announces how many executions are to come, and adds a byte for each that is done.
                total = progress_file.with_suffix(".total")
                if total.exists() and total.read_text().strip():
                    progress.update(task, total=int(total.read_text()))
                progress.update(task, completed=progress_file.stat().st_size)
                look()
                time.sleep(0.2)
        except KeyboardInterrupt:
            # What was judged until here is in the report that pytest writes when it is interrupted.
            child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=30)
            console.print(f"moegate check: interrupted after {progress_file.stat().st_size} executions", style="yellow")
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return log.read_text(), child.returncode


def _print(report: dict[str, Any], status: int, output: str, console: Console) -> None:
    table = Table(title=None, box=None, pad_edge=False)
    for name in ("property", "cases", "budget used", "verdict", "what must hold"):
        table.add_column(name, justify="right" if name in ("cases", "budget used") else "left", overflow="fold")
    for row in report["properties"]:
        used = used_text(row["budget_used"])
        style = {"violated": "red", "known": "yellow"}.get(row["verdict"])
        table.add_row(row["id"], str(row["cases"]), used, row["verdict"], row["sentence"], style=style)
    for row in report["properties"]:
        if row["finding"]:
            console.print(row["finding"], markup=False, highlight=False, soft_wrap=True)
    odd = status not in (0, 1) and report["verdict"] != "inconclusive"
    if odd or (status == 1 and report["verdict"] == "holds"):
        # Something failed that is no finding: a test that could not run, a worker that died.
        console.print(output[-6000:], markup=False, highlight=False)
    console.print(table)
    if report["last_run"]:
        console.print(f"this adapter was last run with: {report['last_run']}", highlight=False)
    numerics = ", ".join(f"{name} {value}" for name, value in report["numerics"].items())
    console.print(f"numerics declared: {numerics}", highlight=False)
    variants = ", ".join(f"{count} {variant}" for variant, count in report["executions_by_variant"].items())
    pairs = report["feature_pairs"]
    console.print(
        f"{report['subject']} on {report['device']}, profile {report['profile']}: {report['executions']} executions "
        f"({variants}), {pairs['run']} of {pairs['declared']} feature pairs, {report['seconds']} s",
        highlight=False,
    )
    for reason, count in report["skipped"].items():
        console.print(f"skipped ({count}): {reason}", highlight=False)
    if report["kernels"]:
        kernels = ", ".join(f"{count} {name}" for name, count in report["kernels"].items())
        console.print(f"kernel variants: {sum(report['kernels'].values())} ({kernels})", highlight=False)
    for fact, count in report["facts"].items():
        console.print(f"{fact}: {count}", highlight=False)
    for line in known_lines(report):
        console.print(line, style="yellow", highlight=False)
    for kind in ("not_judged", "stale", "errors", "inconclusive"):
        for reason in report[kind]:
            console.print(f"{kind.replace('_', ' ')}: {reason}", style="red", highlight=False)
    style = "green" if _exit_code(report, status) == exit_codes.HOLDS else "red"
    console.print(f"verdict: {report['verdict']}", style=style)


def _exit_code(report: dict[str, Any], status: int) -> int:
    if report["verdict"] == "violated":
        return exit_codes.FINDING
    if report["verdict"] == "inconclusive":
        return exit_codes.INCONCLUSIVE
    if not report["properties"]:
        return exit_codes.NOTHING_DONE
    if status == INTERRUPTED:
        return exit_codes.INCONCLUSIVE
    return exit_codes.HOLDS if status == 0 else exit_codes.FINDING
