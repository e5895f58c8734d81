"""What the commands of `moegate history` share: options, the open store, refusals and JSON."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moegate import exit_codes
from moegate.conformance.console import wide_console
from moegate.json_output import expect_output, put_json

if TYPE_CHECKING:
    from moegate.bench.history.answers import Filter
    from moegate.bench.history.queries import History

SCHEMA = "moegate-history-answer/1"
FEW = 200
"""New files that are read without a progress bar."""
VARIABLE = "MOEGATE_HISTORY"


StoreOption = Annotated[
    Path | None, typer.Option("--store", help=f"The history's folder; {VARIABLE}, else .moegate/history, if left out.")
]


def _looked_at(file: str | None) -> str | None:
    expect_output(wide_console(stderr=True), "history", "--json", file)
    return file


JsonOption = Annotated[
    str | None, typer.Option("--json", callback=_looked_at, help="Write the result as JSON; - is standard output.")
]
DeviceOption = Annotated[str | None, typer.Option(help="The GPU's model, or a part of its name.")]
ModelOption = Annotated[str | None, typer.Option(help="The model's name.")]
TokensOption = Annotated[int | None, typer.Option("--tokens", "-M", help="The number of tokens M.")]
RoutingOption = Annotated[str | None, typer.Option(help="uniform, zipf1.2, all-to-one; with or without -sSEED.")]
DtypeOption = Annotated[str | None, typer.Option(help="bf16, fp8-block, ...")]
SubjectOption = Annotated[str | None, typer.Option(help="Who was timed.")]
AllOption = Annotated[bool, typer.Option("--all", help="Every clean run that passed, not the promoted ones alone.")]


def history_folder(store: Path | None) -> Path:
    """The history's folder: as asked for, else the environment's, else below this folder; exit code 4 if it is none."""
    folder = store or Path(os.environ.get(VARIABLE) or Path(".moegate", "history"))
    name = VARIABLE if store is None else "--store"
    if "\0" in str(folder) or not str(folder).isprintable() or (folder.exists() and not folder.is_dir()):
        refuse("", f"{name}: expected a folder, got {str(folder)!a:.300}")
    return folder


def expect_checkout(command: str, repository: Path) -> None:
    """Refuse a `--repo` that is no folder (exit code 4)."""
    if "\0" in str(repository) or not repository.is_dir():
        refuse(command, f"--repo: expected a folder, got {str(repository)!a:.300}")


def open_history(console: Console, store: Path | None) -> History:
    """The history, after what was set aside has been named."""
    from moegate.bench.history.queries import History

    folder = history_folder(store)
    columns = (TextColumn("reading stored runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None, visible=False)

            def watch(done: int, total: int) -> None:
                if total > FEW and done % 50 == 0:
                    bar.update(task, completed=done, total=total, visible=True)

            history = History(folder, watch=watch)
    except FileNotFoundError:
        refuse("", f"--store: expected a folder, got {folder}")
    if history.index.rebuilt:
        console.print(f"the index was made anew: {history.index.rebuilt}", markup=False, soft_wrap=True)
    for each in history.aside():
        console.print(f"set aside: {each.path}: {each.reason}", markup=False, style="yellow", soft_wrap=True)
    return history


def refuse(command: str, message: str) -> NoReturn:
    """Say what is wrong with the arguments, and exit with 4."""
    wide_console(stderr=True).print(
        f"{f'moegate history {command}'.strip()}: {message}", markup=False, style="red", soft_wrap=True
    )
    raise typer.Exit(exit_codes.BAD_ARGUMENTS)


def filter_of(
    device: str | None = None,
    model: str | None = None,
    tokens: int | None = None,
    routing: str | None = None,
    dtype: str | None = None,
    subject: str | None = None,
) -> Filter:
    """What the options of a command select."""
    from moegate.bench.history.answers import Filter

    return Filter(device, model, tokens, routing, dtype, subject)


def aside_of(history: History) -> dict[str, Any]:
    """What was set aside, for JSON."""
    return {"set_aside": [asdict(each) for each in history.aside()]}


def write_answer(json_file: str | None, data: dict[str, Any]) -> None:
    """Write an answer where JSON is wanted; exit code 3 where the disk does not take it."""
    console = wide_console(stderr=True)
    # What was asked about is in the store: only the answer is lost where it cannot be written.
    if not put_json(console, "history", json_file, {"schema": SCHEMA, **data}):
        raise typer.Exit(exit_codes.NOTHING_DONE)
