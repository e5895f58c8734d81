"""`moegate gate`: is the head slower than the base, on this device, by more than chance?"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moegate import exit_codes
from moegate.conformance.console import wide_console
from moegate.json_output import expect_output, put_json, put_text

if TYPE_CHECKING:
    from moegate.bench.gate.measuring import Plan
    from moegate.bench.gate.record import GateRecord
    from moegate.bench.gate.run import Thresholds
    from moegate.bench.gate.sides import Sides
    from moegate.bench.workloads import Workload

_SELECTION = "What is timed"
_MEASURING = "How it is measured"
_SELF_TEST = "The gate's own error rates"


def gate(
    base: Annotated[
        str | None, typer.Option(help="The revision to compare with: origin/main, a tag, a commit.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="The revision to judge; the checkout as it stands if left out.")
    ] = None,
    base_tree: Annotated[
        Path | None, typer.Option(help="A folder with the base's files, where there is no git. Instead of --base.")
    ] = None,
    head_tree: Annotated[Path | None, typer.Option(help="The head's files, with --base-tree; default: here.")] = None,
    subject: Annotated[
        str, typer.Option(help="moegate, or FILE.py:CLASS in this repository: your own layer.")
    ] = "moegate",
    prepare: Annotated[
        str | None, typer.Option(help="A shell command that builds a side, run in its folder.", metavar="CMD")
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            help="The least change in percent that counts, or PATTERN=PERCENT for some workloads; default: 1, or what "
            "can be seen here. One below that is refused. May be repeated.",
            metavar="PERCENT",
        ),
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            help="A change that is meant: backend, assignment, launches, decision, spills, missing, ... or "
            "WHAT:WHERE, with wildcards. May be repeated.",
            metavar="WHAT",
        ),
    ] = None,
    clock: Annotated[
        bool, typer.Option("--clock/--no-clock", help="Time, or compare paths and launches alone.")
    ] = True,
    models: Annotated[str | None, typer.Option(help="Names, comma-separated.", rich_help_panel=_SELECTION)] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens M, comma-separated.", rich_help_panel=_SELECTION)
    ] = None,
    routing: Annotated[
        str, typer.Option(help="uniform, zipf<exponent>, all-to-one.", rich_help_panel=_SELECTION)
    ] = "uniform",
    dtype: Annotated[
        str | None, typer.Option(help="bf16 on a GPU, fp32 on a CPU if left out.", rich_help_panel=_SELECTION)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:N or cpu.", rich_help_panel=_MEASURING)] = None,
    minutes: Annotated[float, typer.Option(help="For everything.", rich_help_panel=_MEASURING)] = 6.0,
    pairs: Annotated[int, typer.Option(help="Pairs of processes at first.", rich_help_panel=_MEASURING)] = 5,
    again: Annotated[
        int, typer.Option(help="Pairs more for what is suspect or unclear.", rich_help_panel=_MEASURING)
    ] = 3,
    rounds: Annotated[int, typer.Option(help="Turns of each side in a pair; even.", rich_help_panel=_MEASURING)] = 6,
    seed: Annotated[int, typer.Option(help="Of all random orders.", rich_help_panel=_MEASURING)] = 0,
    allow_dirty: Annotated[bool, typer.Option("--allow-dirty", help="Judge a checkout with changes.")] = False,
    allow_busy: Annotated[bool, typer.Option("--allow-busy", help="Measure on a GPU that others use.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an interrupted run of the same sides.")] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write the record as JSON; - is standard output.")
    ] = None,
    markdown_file: Annotated[
        str | None, typer.Option("--markdown", help="Write the report as Markdown; - is standard output.")
    ] = None,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test", help="Measure this tree against itself, plain and slowed down.", rich_help_panel=_SELF_TEST
        ),
    ] = False,
    levels: Annotated[
        str, typer.Option(help="Slow-downs to inject, percent; empty for none.", rich_help_panel=_SELF_TEST)
    ] = "1,2,3,5",
) -> None:
    """Compare two revisions on this device, and say of each workload: FASTER, SAME, SLOWER or UNCLEAR.

    The base is checked out beside the head and measured with the head's harness. Pairs of fresh processes take turns;
    what looks like a change is measured again before it counts.

    Exit codes: 0 no regression, 1 a regression or a lost path, 2 inconclusive, 3 nothing could be measured, 4 bad
    arguments.
    """
    console = wide_console(stderr="-" in (json_file, markdown_file))
    for option, file in (("--json", json_file), ("--markdown", markdown_file)):
        expect_output(console, "gate", option, file)
    from moegate.bench.gate.measuring import Plan
    from moegate.bench.gate.run import Request, run_gate
    from moegate.bench.gate.sides import BadSidesError, SideError

    try:
        plan = Plan(pairs=pairs, again=again, rounds=rounds, minutes=minutes, seed=seed)
        thresholds, fractions = _thresholds(threshold or []), _fractions(levels)
        for word in accept or ():
            if not (word.strip() and word.isprintable()):
                raise ValueError(f"accept: expected a change or WHAT:WHERE, got {word!a:.80}")
        workloads, where = _workloads(console, device, models, tokens, routing, dtype)
        if self_test:
            _self_test(console, workloads, where, plan, fractions, json_file)
        sides = _sides(base, head, base_tree, head_tree, subject, prepare, allow_dirty)
        request = Request(
            workloads,
            where,
            plan,
            thresholds,
            clock,
            tuple(accept or ()),
            allow_busy,
            fresh,
            {"models": models, "tokens": tokens, "routings": routing, "dtype": dtype},
        )
        with _bar(console) as bar:
            record = run_gate(sides, request, _progress(bar))
    except BadSidesError as error:
        _stop(console, str(error), exit_codes.BAD_ARGUMENTS)
    except ValueError as error:
        _stop(console, str(error), exit_codes.BAD_ARGUMENTS)
    except SideError as error:
        _stop(console, str(error), exit_codes.NOTHING_DONE)
    except KeyboardInterrupt:
        _stop(console, "interrupted; the same command goes on from what was measured", exit_codes.NOTHING_DONE)
    is_written = put_json(console, "gate", json_file, record.as_dict(), indent=1)
    is_written &= _print(console, record, markdown_file)
    raise typer.Exit(record.exit_code if is_written or record.exit_code else exit_codes.NOTHING_DONE)


def _workloads(
    console: Console, device: str | None, models: str | None, tokens: str | None, routing: str, dtype: str | None
) -> tuple[list[Workload], str]:
    from moegate.bench.selection import choose_device, select_workloads

    del console
    where = choose_device(device)
    workloads = select_workloads(where, models=models, tokens=tokens, routings=routing, dtype=dtype)
    return workloads, str(where)


def _sides(
    base: str | None,
    head: str | None,
    base_tree: Path | None,
    head_tree: Path | None,
    subject: str,
    prepare: str | None,
    allow_dirty: bool,
) -> Sides:
    from moegate.bench.gate.sides import BadSidesError, choose_sides, trees_as_sides

    if (base is None) == (base_tree is None):
        raise BadSidesError("base: expected --base REV or --base-tree FOLDER, and not both")
    if base is not None:
        if head_tree is not None:
            raise BadSidesError("head-tree: expected it with --base-tree alone; --head takes a revision")
        return choose_sides(Path.cwd(), base, head, subject=subject, prepare=prepare, allow_dirty=allow_dirty)
    if head is not None:
        raise BadSidesError("head: expected --head-tree with --base-tree")
    return trees_as_sides(base_tree or Path(), head_tree or Path.cwd(), _cache(), subject=subject, prepare=prepare)


def _cache() -> Path:
    """Where there may be no git."""
    import os

    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moegate" / "gate"


def _thresholds(words: list[str]) -> Thresholds:
    from moegate.bench.gate.run import Thresholds

    default, by_pattern = None, {}
    for word in words:
        pattern, separator, percent = word.rpartition("=")
        try:
            value = float(percent) / 100
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf or (separator and not pattern):
            raise ValueError(f"threshold: expected PERCENT or PATTERN=PERCENT, got {word!a:.80}")
        if separator:
            by_pattern[pattern] = value
        else:
            default = value
    return Thresholds(default, by_pattern)


def _fractions(levels: str) -> list[float]:
    try:
        fractions = [float(level) / 100 for level in levels.split(",")] if levels.strip() else []
        if all(0 < fraction < math.inf for fraction in fractions):
            return fractions
    except ValueError:
        pass
    raise ValueError(f"levels: expected percents such as 1,2,3,5, got {levels!a:.80}")


def _self_test(
    console: Console, workloads: list[Workload], device: str, plan: Plan, fractions: list[float], json_file: str | None
) -> NoReturn:
    from dataclasses import replace

    from moegate.bench.gate import trial
    from moegate.bench.gate.selftest import run_self_test

    # As many pairs as the time allows: each is evidence.
    most = replace(plan, pairs=max(plan.pairs, 100))

    def keep(data: dict[str, Any]) -> None:
        if json_file != "-":
            put_json(console, "gate", json_file, data)

    with _bar(console) as bar:
        data = run_self_test(
            Path.cwd(), workloads, device, most, _cache(), levels=fractions, progress=_progress(bar), keep=keep
        )
    if json_file == "-" or not data["pairs"]:
        put_json(console, "gate", json_file, data)
    for name, reason in data["failed"].items():
        console.print(f"not measured: {name}: {reason}", markup=False, soft_wrap=True)
    machine = data["machine"]
    console.print(
        f"{data['pairs']} pairs in {data.get('seconds', 0):.0f} s on {machine.get('device')}", highlight=False
    )
    first = min(plan.pairs, data["pairs"] - 2)
    if first < 2:
        _stop(
            console, f"{data['pairs']} pairs are too few for a table; give it more --minutes", exit_codes.INCONCLUSIVE
        )
    rates = trial.run_trial([data], tables=300, first=first, again=min(plan.again, data["pairs"] - first))
    for line in trial.lines(rates):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(exit_codes.HOLDS)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _progress(bar: Progress) -> Any:
    task, started = bar.add_task("starting", total=None), time.monotonic()

    def show(phase: str, done: int, total: int) -> None:
        bar.update(task, description=phase, completed=done, total=total)
        if done == total and not bar.console.is_terminal:
            bar.console.print(f"{phase}: {done} workloads, {time.monotonic() - started:.0f} s", highlight=False)

    return show


def _print(console: Console, record: GateRecord, markdown_file: str | None) -> bool:
    """Show the report, and write it where that is asked for; whether that was done."""
    from moegate.bench.gate.markdown import markdown

    text = markdown(record)
    if markdown_file == "-":
        typer.echo(text)
        return True
    is_written = markdown_file is None or put_text(console, "gate", "--markdown", markdown_file, text)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return is_written


def _stop(console: Console, message: str, code: int) -> NoReturn:
    console.print(f"moegate gate: {message}", markup=False, style="red", soft_wrap=True)
    raise typer.Exit(code)
