"""Files that commands write their results to: looked at before the work, written whole behind it."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console

from moegate import exit_codes

STANDARD_OUTPUT = "-"


def expect_output(console: Console, command: str, option: str, file: Any, *, make_folders: bool = False) -> None:
    """Refuse a file that cannot be written before there is a result to lose (exit code 4)."""
    from moegate.impl.whole_file import expect_writable

    if file is None or file == STANDARD_OUTPUT:
        return
    try:
        expect_writable(option, file, make_folders=make_folders)
    except ValueError as error:
        console.print(f"moegate {command}: {error}", markup=False, style="red", soft_wrap=True)
        raise typer.Exit(exit_codes.BAD_ARGUMENTS) from None


def expect_json_file(console: Console, command: str, file: str | None) -> None:
    """`expect_output` of `--json`."""
    expect_output(console, command, "--json", file)


def put_text(console: Console, command: str, option: str, file: Any, text: str) -> bool:
    """Write a result; False, with what went wrong said, where the disk did not take it."""
    from moegate.impl.whole_file import write_whole

    try:
        write_whole(file, text)
    except OSError as error:
        console.print(f"moegate {command}: {option}: not written: {error}", markup=False, style="red", soft_wrap=True)
        return False
    return True


def put_json(console: Console, command: str, file: str | None, report: Any, indent: int = 2) -> bool:
    """Write a command's result as JSON, where that is asked for; as `put_text`."""
    if file is None:
        return True
    text = json.dumps(report, indent=indent)
    if file == STANDARD_OUTPUT:
        typer.echo(text)
        return True
    return put_text(console, command, "--json", file, text + "\n")
