"""`moegate history`: stored runs, what changed between them, and since when."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from moegate import exit_codes
from moegate.conformance.console import wide_console
from moegate.history_common import (
    AllOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RoutingOption,
    StoreOption,
    SubjectOption,
    TokensOption,
    aside_of,
    expect_checkout,
    filter_of,
    history_folder,
    open_history,
    refuse,
    write_answer,
)
from moegate.history_tables import changes_table, print_comparison, range_table, runs_table

if TYPE_CHECKING:
    from moegate.bench.history.answers import Filter
    from moegate.bench.history.queries import History

NEWEST = 1000

app = typer.Typer(
    no_args_is_help=True,
    help="Stored benchmark runs: add, list, compare, find change points, promote to baseline.",
)


@app.command()
def add(
    files: Annotated[
        list[Path], typer.Argument(help="--benchmark-json, `moegate bench --json`, `moegate gate --json`.")
    ],
    store: StoreOption = None,
    exit_code: Annotated[
        int | None,
        typer.Option(
            help="How the run ended. Of files that do not say it themselves: without it, they are no baseline."
        ),
    ] = None,
    repository: Annotated[
        Path, typer.Option("--repo", help="The checkout that ran, for `moegate bench --json`, which knows no commit.")
    ] = Path(),
    json_file: JsonOption = None,
) -> None:
    """Store what runs wrote. A failed run is stored too, and can never be a baseline.

    Exit codes: 0 stored (or stored already), 4 a file that is no such run, or a store that cannot be written.
    """
    from moegate.bench.history.run import ForeignFileError
    from moegate.bench.history.store import Store

    console = wide_console(stderr=json_file == "-")
    target = Store(history_folder(store))
    expect_checkout("add", repository)
    stored, refused = [], False
    for file in files:
        try:
            id, path, is_new = _add(target, file, exit_code, repository)
        except (ForeignFileError, OSError) as error:
            console.print(f"moegate history add: {file}: {error}", markup=False, style="red", soft_wrap=True)
            refused = True
            continue
        stored.append({"file": str(file), "id": id, "path": str(path), "new": is_new})
        console.print(f"{id} {'stored' if is_new else 'was stored before'}: {path}", markup=False, soft_wrap=True)
    write_answer(json_file, {"stored": stored})
    raise typer.Exit(exit_codes.BAD_ARGUMENTS if refused else exit_codes.HOLDS)


@app.command("list")
def list_runs(
    store: StoreOption = None,
    device: DeviceOption = None,
    model: ModelOption = None,
    tokens: TokensOption = None,
    routing: RoutingOption = None,
    dtype: DtypeOption = None,
    subject: SubjectOption = None,
    commit: Annotated[str, typer.Option(help="The beginning of a commit id.")] = "",
    promoted: Annotated[bool, typer.Option("--promoted", help="Only runs that may be a baseline.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many, the newest first.")] = 40,
    json_file: JsonOption = None,
) -> None:
    """List stored runs, the newest first.

    Exit codes: 0 listed, 3 there is none, 4 bad arguments.
    """
    console = wide_console(stderr=json_file == "-")
    with open_history(console, store) as history:
        runs = history.runs(
            filter_of(device, model, tokens, routing, dtype, subject), commit=commit, promoted=promoted, limit=limit
        )
        write_answer(
            json_file, {"runs": [{**asdict(run), "outcome": run.outcome} for run in runs], **aside_of(history)}
        )
        if not runs:
            console.print("no run is stored that the options select")
        else:
            console.print(runs_table(runs))
    raise typer.Exit(exit_codes.HOLDS if runs else exit_codes.NOTHING_DONE)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="A run, a commit, latest, baseline; or a range A..B.")],
    after: Annotated[str | None, typer.Argument(help="Another; the newest run if left out.")] = None,
    store: StoreOption = None,
    device: DeviceOption = None,
    model: ModelOption = None,
    tokens: TokensOption = None,
    routing: RoutingOption = None,
    dtype: DtypeOption = None,
    subject: SubjectOption = None,
    json_file: JsonOption = None,
) -> None:
    """Put two stored runs side by side, or every run of a range A..B.

    Stored times drift with driver, clocks and temperature: this informs, and `moegate gate` judges.
    Exit codes: 0 compared, 3 they have nothing in common, 4 an unknown run.
    """
    from moegate.bench.history.answers import UnknownRunError
    from moegate.bench.history.queries import LATEST

    console = wide_console(stderr=json_file == "-")
    which = filter_of(device, model, tokens, routing, dtype, subject)
    with open_history(console, store) as history:
        try:
            if ".." in before:
                if after is not None:
                    refuse("compare", f"after: expected none beside a range, got {after!r}")
                first, _, last = before.partition("..")
                compared = _range(console, history, first, last or LATEST, which, json_file)
            else:
                older, newer = history.find(before, which), history.find(after or LATEST, which)
                comparison = history.compare(older, newer, which)
                write_answer(json_file, {**comparison.as_dict(), **aside_of(history)})
                print_comparison(console, comparison)
                compared = bool(comparison.rows)
        except UnknownRunError as error:
            refuse("compare", str(error))
    raise typer.Exit(exit_codes.HOLDS if compared else exit_codes.NOTHING_DONE)


@app.command()
def changes(
    store: StoreOption = None,
    device: DeviceOption = None,
    model: ModelOption = None,
    tokens: TokensOption = None,
    routing: RoutingOption = None,
    dtype: DtypeOption = None,
    subject: SubjectOption = None,
    every: AllOption = False,
    min_change: Annotated[float, typer.Option(min=0, max=1e6, help="The least relative change that counts.")] = 0.01,
    max_p: Annotated[float, typer.Option(help="The largest p-value that counts.")] = 0.001,
    newest: Annotated[
        int, typer.Option("--newest", "-n", min=1, help="Search so many runs of each GPU model, the newest.")
    ] = NEWEST,
    fail_recent: Annotated[
        int, typer.Option(min=0, help="Exit with 1 if a series got slower within its last N commits.")
    ] = 0,
    json_file: JsonOption = None,
) -> None:
    """Find the commits since when a workload is slower or faster, for each GPU model and routing alone.

    Exit codes: 0 searched, 1 slower within --fail-recent commits, 3 no series is long enough, 4 bad arguments.
    """
    from moegate.bench.history.change_points import LEAST
    from moegate.bench.history.changes import changes_of, is_searchable

    console = wide_console(stderr=json_file == "-")
    if not 0 < max_p < 1:
        refuse("changes", f"--max-p: expected a number in (0, 1), got {max_p}")
    if find_spec("ruptures") is None:
        refuse("changes", "ruptures is not installed: pip install ruptures")
    which = filter_of(device, model, tokens, routing, dtype, subject)
    with open_history(console, store) as history:
        series = history.series(which, promoted=not every, newest=newest)
        long_enough = [one for one in series if is_searchable(one)]
        rows = [change.as_dict() for change in changes_of(long_enough, max_p=max_p, min_change=min_change)]
        write_answer(
            json_file,
            {"series": len(series), "searched": len(long_enough), "changes": rows, **aside_of(history)},
        )
    if rows:
        console.print(changes_table(rows))
    kind = "clean run that passed" if every else "promoted run"
    console.print(
        f"{len(rows)} change points in {len(long_enough)} of {len(series)} series over every {kind} among the newest "
        f"{newest} of each GPU model; a series needs {2 * LEAST} commits"
    )
    if not long_enough:
        raise typer.Exit(exit_codes.NOTHING_DONE)
    recent = [row for row in rows if row["change"] > 0 and row["commits_since"] <= fail_recent]
    raise typer.Exit(exit_codes.FINDING if recent else exit_codes.HOLDS)


@app.command()
def promote(
    run: Annotated[str, typer.Argument(help="A run, a commit or latest.")] = "latest",
    store: StoreOption = None,
    device: DeviceOption = None,
    main: Annotated[str, typer.Option(help="The main branch; the remote's is asked where there is one.")] = "main",
    repository: Annotated[Path, typer.Option("--repo", help="A checkout with the main branch's history.")] = Path(),
    json_file: JsonOption = None,
) -> None:
    """Let a run be a baseline: one that passed, of a clean commit on the main branch.

    Exit codes: 0 promoted (or promoted already), 1 refused, 4 an unknown run.
    """
    from moegate.bench.history.answers import UnknownRunError
    from moegate.bench.history.promotion import PromotionRefusedError, judge

    console = wide_console(stderr=json_file == "-")
    expect_checkout("promote", repository)
    if main.startswith("-") or not main.isprintable():
        refuse("promote", f"--main: expected a branch, got {main!a:.80}")
    with open_history(console, store) as history:
        try:
            found = history.find(run, filter_of(device=device))
        except UnknownRunError as error:
            refuse("promote", str(error))
        try:
            why = judge(repository, main, commit=found.commit, dirty=found.dirty, exit_code=found.exit_code)
        except PromotionRefusedError as error:
            write_answer(json_file, {"run": found.id, "promoted": False, "why": str(error)})
            console.print(f"run {found.id} is not promoted: {error}", markup=False, style="red", soft_wrap=True)
            raise typer.Exit(exit_codes.FINDING) from None
        is_new = history.store.promote(found.id, why)
    write_answer(json_file, {"run": found.id, "promoted": True, "new": is_new})
    console.print(
        f"run {found.id} of commit {found.commit[:12]} {'is promoted' if is_new else 'was promoted before'}",
        markup=False,
    )
    raise typer.Exit(exit_codes.HOLDS)


@app.command()
def rebuild(
    store: StoreOption = None,
    move_aside: Annotated[
        bool, typer.Option("--move-aside", help="Move files that are no part of the history to STORE/aside.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Make the index anew from the files, and name those that are damaged or foreign.

    Exit codes: 0 every file was read, 1 some were not, 4 bad arguments.
    """
    from moegate.bench.history.index import default_path
    from moegate.bench.history.store import Store

    console = wide_console(stderr=json_file == "-")
    folder = history_folder(store)
    default_path(Store(folder)).unlink(missing_ok=True)
    started = time.monotonic()
    with open_history(console, store) as history:
        aside = history.aside()
        if move_aside:
            for each in aside:
                target = folder / "aside" / each.path
                target.parent.mkdir(parents=True, exist_ok=True)
                (folder / each.path).replace(target)
        runs = len(history.runs())
        write_answer(json_file, {"runs": runs, **aside_of(history), "moved": move_aside})
        console.print(f"{runs} runs from {history.index.refreshed} files in {time.monotonic() - started:.1f} s")
    raise typer.Exit(exit_codes.FINDING if aside else exit_codes.HOLDS)


def _add(target: Any, file: Path, exit_code: int | None, repository: Path) -> tuple[str, Path, bool]:
    from moegate.bench.history.document import BENCH_RUN_SCHEMA, document
    from moegate.bench.history.provenance import GitError, commit_info, origin
    from moegate.bench.history.run import parse_json
    from moegate.bench.history.store import GATE_SCHEMA

    data = parse_json(file.read_bytes())
    if data.get("schema") == GATE_SCHEMA:
        return target.add_gate(data)
    commit: dict[str, object] = {}
    if data.get("schema") == BENCH_RUN_SCHEMA:
        try:
            commit = commit_info(repository)
        except GitError:
            commit = {}  # outside of git: stored, and never a baseline
    written = datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")
    return target.add(document(data, exit_code=exit_code, origin=origin(), commit=commit, time=written))


def _range(console: Console, history: History, first: str, last: str, which: Filter, json_file: str | None) -> bool:
    """Every series over the runs of a range; whether there was one."""
    runs = history.between(history.find(first, which), history.find(last, which), which)
    series = history.series(which, promoted=False, runs=[run.id for run in runs])
    rows = []
    for one in series:
        seconds = [point.seconds for point in one.points]
        rows.append(
            {
                "key": asdict(one.key),
                "commits": len(seconds),
                "first": seconds[0],
                "last": seconds[-1],
                "low": min(seconds),
                "high": max(seconds),
                "change": seconds[-1] / seconds[0] - 1,
            }
        )
    write_answer(json_file, {"runs": [asdict(run) for run in runs], "rows": rows, **aside_of(history)})
    console.print(f"{len(runs)} runs on {runs[0].device}, from {runs[0].time} to {runs[-1].time}", markup=False)
    if rows:
        console.print(range_table(rows))
    return bool(rows)
