"""`moegate report`: history, gates, conformance, planted faults and decisions as one HTML file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from moegate import __version__, exit_codes
from moegate.conformance.console import wide_console
from moegate.history_common import StoreOption, history_folder
from moegate.json_output import expect_output, put_json

# Of one report that is handed in.
MOST_BYTES = 1 << 26
SCHEMA = "moegate-report/1"


def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("moegate-report.html"),
    store: StoreOption = None,
    gate: Annotated[list[Path] | None, typer.Option(help="`moegate gate --json`, beside those stored.")] = None,
    check: Annotated[list[Path] | None, typer.Option(help="`moegate check --json`. May be repeated.")] = None,
    faults: Annotated[list[Path] | None, typer.Option(help="`moegate faults --json`. May be repeated.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Draw every clean run that passed, not the promoted ones alone.")
    ] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Say as JSON what is in it; - is standard output.")
    ] = None,
) -> None:
    """Write one self-contained HTML file: it needs no network, and no other file.

    Exit codes: 0 written, 3 there is nothing to show, 4 a file that cannot be read, or a missing package.
    """
    console = wide_console(stderr=json_file == "-")
    expect_output(console, "report", "--json", json_file)
    expect_output(console, "report", "--output", output, make_folders=True)
    try:
        from moegate.bench.history.queries import History
        from moegate.bench.html_report.contents import UnreadableError, gather
        from moegate.bench.html_report.decisions import decision_table
        from moegate.bench.html_report.page import render
        from moegate.impl.whole_file import write_whole
    except ModuleNotFoundError as error:
        _refuse(f"{error.name} is not installed: pip install {error.name}")
    files = {"gates": ("gate", gate), "checks": ("check", check), "faults": ("faults", faults)}
    handed_in = {name: [_read(option, path) for path in paths or []] for name, (option, paths) in files.items()}
    folder = history_folder(store)
    if store is not None and not folder.is_dir():
        _refuse(f"--store: expected a folder, got {folder}")
    if not folder.is_dir() and not any(handed_in.values()):
        console.print(f"nothing to show: no history at {folder}, and no --gate, --check or --faults")
        raise typer.Exit(exit_codes.NOTHING_DONE)
    with ExitStack() as stack:
        history = stack.enter_context(History(folder)) if folder.is_dir() else None
        try:
            contents = gather(history, version=__version__, decisions=decision_table(), promoted=not every, **handed_in)
        except UnreadableError as error:
            _refuse(f"--{error}")
    page = render(contents).encode()
    try:
        write_whole(output, page, make_folders=True)
    except OSError as error:
        _refuse(f"--output: {error}")
    for path, reason in contents.aside:
        console.print(f"set aside: {path}: {reason}", markup=False, style="yellow", soft_wrap=True)
    counts = {name: len(getattr(contents, name)) for name in ("series", "changes", "gates", "checks", "faults")}
    console.print(
        f"{output}: {', '.join(f'{count} {name}' for name, count in counts.items())}, {len(page) / 2**20:.1f} MiB",
        markup=False,
        soft_wrap=True,
    )
    said = {"schema": SCHEMA, "file": str(output), **counts, "set_aside": [list(each) for each in contents.aside]}
    is_written = put_json(console, "report", json_file, said)
    raise typer.Exit(exit_codes.HOLDS if is_written else exit_codes.NOTHING_DONE)


def _read(option: str, path: Path) -> dict[str, Any]:
    from moegate.impl.json_file import JsonFileError, parse_object, read_bytes

    try:
        content = read_bytes(path, most=MOST_BYTES)
        if content is None:
            raise JsonFileError(path, "", "is not there")
        return parse_object(path, content)
    except JsonFileError as error:
        _refuse(f"--{option}: {error}")


def _refuse(message: str) -> NoReturn:
    wide_console(stderr=True).print(f"moegate report: {message}", markup=False, style="red", soft_wrap=True)
    raise typer.Exit(exit_codes.BAD_ARGUMENTS)
