"""`moegate faults`: plant faults in an implementation, one at a time, and see which property kills each."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moegate import exit_codes
from moegate.conformance.console import wide_console
from moegate.conformance.faults.client import HuntError, outcomes_of
from moegate.conformance.faults.fault import CatalogueError, Fault, load_catalogue
from moegate.conformance.faults.job import Job, Orders, Outcome
from moegate.conformance.faults.record import (
    Journal,
    read_matrix,
    read_witnesses,
    state_of,
    write_matrix,
    write_witnesses,
)
from moegate.json_output import expect_json_file, expect_output, put_json

SCHEMA = 1
# A catalogue must be killed whole; of mutants, many of which change nothing that anybody can see, so many.
LEAST_OF_MUTANTS = 0.85
# A case under Triton's interpreter takes a second; on a GPU its kernels may have to be compiled first.
SILENCE_S = {"cpu": 60.0, "cuda": 120.0}
# Of one fault. A matrix runs everything, and a mutant that survives does so only when all its cases have run.
LIMIT_S, LONG_LIMIT_S = 300.0, 1800.0


def faults(
    area: Annotated[
        list[str] | None, typer.Option("--area", "-a", help="Only faults of this area; again for another.")
    ] = None,
    select: Annotated[str | None, typer.Option("--select", "-k", help="Only faults whose id contains this.")] = None,
    catalogue: Annotated[
        list[Path] | None, typer.Option("--catalogue", help="A catalogue of your own (TOML), instead of the one here.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu (Triton's interpreter), or cuda, which runs what a CPU cannot show.")
    ] = "cpu",
    everything: Annotated[bool, typer.Option("--all", help="On a GPU: also the faults that a CPU shows.")] = False,
    witness: Annotated[
        bool, typer.Option("--witness", help="Try the case that is checked in first; search only where it fails.")
    ] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Every applicable property on every fault, a few cases each.")
    ] = False,
    mutate: Annotated[int, typer.Option(help="Instead of a catalogue: so many mutants, made by rule.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the sample of mutants.")] = 0,
    scale: Annotated[float, typer.Option(help="Multiplies the number of drawn cases.")] = 0.5,
    workers: Annotated[int, typer.Option("--workers", "-n", help="Processes; 0: one a core, at most 16.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Keep outcomes in this file, and leave out what stands there.")
    ] = None,
    update: Annotated[
        bool,
        typer.Option("--update-witnesses", help="Check in the cases that a search found, or what a matrix counted."),
    ] = False,
    quickest: Annotated[
        int, typer.Option(help="Look at so many cases more after a kill, and take the quickest for a witness.")
    ] = 0,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write the result as JSON; - is standard output.")
    ] = None,
) -> None:
    """Prove the suite's power to detect: each fault must be killed, by a property that its area calls for.

    Exit codes: 0 all killed, 1 one survives or is killed by something else alone, 2 a hunt itself failed, 3 nothing
    could be hunted here, 4 bad arguments or a catalogue that does not fit the source.
    """
    console = wide_console(stderr=json_file == "-")
    if not 0 < scale < math.inf:
        _refuse(console, f"--scale: expected a number above 0, got {scale}")
    for option, number in (("--workers", workers), ("--mutate", mutate), ("--quickest", quickest)):
        if number < 0:
            _refuse(console, f"{option}: expected at least 0, got {number}")
    expect_json_file(console, "faults", json_file)
    if resume is not None:
        expect_output(console, "faults", "--resume", resume)
    if device not in ("cpu", "cuda"):
        _refuse(console, f"--device: expected cpu or cuda, got {device!r}")
    if matrix and witness:
        _refuse(console, "--matrix: expected no --witness beside it, whose one case says nothing of other properties")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            console.print("moegate faults: --device cuda: torch sees no GPU here", style="red")
            raise typer.Exit(exit_codes.NOTHING_DONE)
    mode = "matrix" if matrix else "witness" if witness else "search"
    try:
        every = _every(catalogue, mutate, seed)
        wanted = _wanted(every, area or [], select)
        for fault in wanted:
            fault.sources()
        runnable, left_out = _runnable(wanted, device, everything)
        if matrix:
            # What it lacks comes first, and in such an order that what there is, when it is cut off, is of all areas.
            known_rows = read_matrix(every)
            runnable.sort(key=lambda fault: (fault.id in known_rows, hashlib.sha256(fault.id.encode()).digest()))
        witnesses = read_witnesses() if witness else {}
        state = state_of(fault.package for fault in runnable)
        journal = Journal(resume, f"{mode} {device} {scale} {state}")
        done = journal.read(runnable)
    except CatalogueError as error:
        _refuse(console, str(error))
    jobs = []
    for fault in runnable:
        if fault.id not in done:
            known = witnesses.get(fault.id)
            found = known.witness if known is not None and known.digest == fault.digest() else None
            orders = Orders(
                device,
                scale,
                found,
                everything=matrix,
                any_kill=mutate > 0,
                quickest=quickest,
                silence_s=SILENCE_S[device],
                limit_s=LONG_LIMIT_S if matrix or mutate else LIMIT_S,
            )
            jobs.append(Job(fault, orders))
    # A search takes longer than a witness: begun last, it would keep one process busy and leave the others idle.
    jobs.sort(key=lambda job: job.orders.witness is not None)
    was_interrupted = False
    try:
        _hunt(jobs, workers or min(os.cpu_count() or 1, 16), done, journal, console)
    except HuntError as error:
        console.print(f"moegate faults: {error}", style="red", markup=False)
        raise typer.Exit(exit_codes.INCONCLUSIVE) from error
    except KeyboardInterrupt:
        goes_on = "" if resume is None else "; the same command goes on from there"
        console.print(
            f"moegate faults: interrupted after {len(done)} of {len(runnable)} faults{goes_on}", style="yellow"
        )
        was_interrupted = True
    outcomes = [done[fault.id] for fault in runnable if fault.id in done]
    if update:
        (write_matrix if matrix else write_witnesses)(every, done)
    report = _report(outcomes, wanted, left_out, device, mode)
    is_written = put_json(console, "faults", json_file, report)
    _print(outcomes, report, console, details=mutate == 0)
    code = _exit_code(outcomes, LEAST_OF_MUTANTS if mutate else 1.0)
    if was_interrupted and code == exit_codes.HOLDS:
        code = exit_codes.INCONCLUSIVE
    raise typer.Exit(code if is_written or code == exit_codes.FINDING else exit_codes.NOTHING_DONE)


def _every(catalogue: list[Path] | None, mutate: int, seed: int) -> list[Fault]:
    if not mutate:
        return load_catalogue(catalogue)
    if catalogue:
        raise CatalogueError("--mutate: expected no --catalogue beside it, got both")
    from moegate.conformance.faults.mutants import sample
    from moegate.conformance.faults.survivors import without_equivalents

    return without_equivalents(sample(mutate, seed))


def _refuse(console: Console, message: str) -> None:
    console.print(f"moegate faults: {message}", markup=False, style="red", soft_wrap=True)
    raise typer.Exit(exit_codes.BAD_ARGUMENTS)


def _wanted(every: list[Fault], areas: list[str], select: str | None) -> list[Fault]:
    known = {fault.area for fault in every}
    if unknown := set(areas) - known:
        raise CatalogueError(f"--area: expected some of {sorted(known)}, got {sorted(unknown)}")
    wanted = [fault for fault in every if not areas or fault.area in areas]
    wanted = [fault for fault in wanted if select is None or select in fault.id]
    if not wanted:
        raise CatalogueError(f"--select: expected part of a fault's id, got {select!r}")
    return wanted


def _runnable(faults: list[Fault], device: str, everything: bool) -> tuple[list[Fault], dict[str, str]]:
    """What is hunted here, and why the others are not."""
    runnable, left_out = [], {}
    for fault in faults:
        if fault.equivalent:
            left_out[fault.id] = f"equivalent: {fault.equivalent}"
        elif "cuda" in fault.needs and device != "cuda":
            left_out[fault.id] = "needs a GPU"
        elif "cuda" not in fault.needs and device == "cuda" and not everything:
            left_out[fault.id] = "a CPU shows it"
        else:
            runnable.append(fault)
    return runnable, left_out


def _hunt(jobs: list[Job], workers: int, done: dict[str, Outcome], journal: Journal, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    by_id = {job.fault.id: job.fault for job in jobs}
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("faults", total=len(done) + len(jobs), completed=len(done))
        for outcome in outcomes_of(jobs, workers):
            done[outcome.id] = outcome
            journal.add(by_id[outcome.id], outcome)
            progress.update(task, advance=1)
            if not outcome.expected:
                progress.console.print(_line(outcome), markup=False, highlight=False)


def _line(outcome: Outcome) -> str:
    if outcome.broken:
        return f"{outcome.id}: the hunt failed: {outcome.broken}"
    if not outcome.killed:
        return f"{outcome.id}: SURVIVES {outcome.cases} cases" + (f", {outcome.detail}" if outcome.detail else "")
    return f"{outcome.id}: killed by {', '.join(outcome.by)} alone, none of which is expected: {outcome.detail[:200]}"


def _report(
    outcomes: list[Outcome], faults: list[Fault], left_out: dict[str, str], device: str, mode: str
) -> dict[str, Any]:
    killed = [outcome for outcome in outcomes if outcome.expected]
    cases = [outcome.cases for outcome in killed if not outcome.from_witness]
    areas = {fault.id: fault.area for fault in faults}
    return {
        "schema": SCHEMA,
        "mode": mode,
        "device": device,
        "score": round(len(killed) / len(outcomes), 4) if outcomes else None,
        "killed": len(killed),
        "hunted": len(outcomes),
        "by_witness": sum(outcome.from_witness for outcome in killed),
        "median_cases": statistics.median(cases) if cases else None,
        "faults": [outcome.as_dict() for outcome in outcomes],
        "not_hunted": [{"id": id, "area": areas[id], "why": why} for id, why in left_out.items()],
    }


def _print(outcomes: list[Outcome], report: dict[str, Any], console: Console, *, details: bool) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("fault", "area", "killed by", "cases", "s"):
        table.add_column(name, justify="right" if name in ("cases", "s") else "left", overflow="fold")
    for outcome in outcomes:
        by = ", ".join(outcome.by) if outcome.killed else outcome.broken or "SURVIVES"
        style = None if outcome.expected else "red"
        how = "witness" if outcome.from_witness else str(outcome.cases)
        if details or not outcome.expected:
            table.add_row(outcome.id, outcome.area, by, how, f"{outcome.seconds:.1f}", style=style)
    console.print(table)
    why: dict[str, int] = {}
    for row in report["not_hunted"]:
        reason = row["why"].split(":")[0]
        why[reason] = why.get(reason, 0) + 1
    for reason, count in why.items():
        console.print(f"not hunted ({count}): {reason}", highlight=False)
    median = "" if report["median_cases"] is None else f", median cases to a kill {report['median_cases']:g}"
    by_witness = f", {report['by_witness']} by their witness" if report["mode"] == "witness" else ""
    console.print(
        f"score: {report['killed']} of {report['hunted']} killed on {report['device']}{by_witness}{median}",
        style="green" if report["killed"] == report["hunted"] else "red",
    )


def _exit_code(outcomes: list[Outcome], least: float) -> int:
    if not outcomes:
        return exit_codes.NOTHING_DONE
    if any(outcome.broken for outcome in outcomes):
        return exit_codes.INCONCLUSIVE
    killed = sum(outcome.expected for outcome in outcomes)
    return exit_codes.HOLDS if killed >= least * len(outcomes) else exit_codes.FINDING
