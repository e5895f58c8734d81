"""Bad command-line options and environment variables: refused by name with exit code 4, and nothing is written.

An option or a variable that joins without bad values of its own fails a test here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from option_values import ALSO_CALLED, BESIDE, COMMON, LONG, NAMES, OPTIONS
from typer.testing import CliRunner

from moegate import exit_codes
from moegate.bench import __main__ as bench_main
from moegate.conformance.properties.bad_input import refusal_of, time_limit
from moegate.impl import shared_experts
from moegate.impl.checks import switch
from moegate.impl.experts import kernel_form
from moegate.impl.oracle import select
from moegate.impl.platform import Platform
from moegate.impl.tuning import lookup
from moegate.main import app

ROOT = Path(__file__).resolve().parents[1]


def _cases() -> list[Any]:
    return list(_each())


def _each() -> Iterator[Any]:
    for command, options in OPTIONS.items():
        for option, values in options.items():
            for number, value in enumerate(values):
                yield pytest.param(command, option, value, id=f"{command} {option}-{number} {ascii(value)[:30]}")


@pytest.mark.parametrize(("command", "option", "value"), _cases())
def test_a_bad_option_is_refused_by_name(
    command: str, option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {"file.json": "{}", "empty.json": "", "list.json": "[[[1]]]"}.items():
        (tmp_path / name).write_text(content)
    before = sorted(os.listdir(tmp_path))
    beside = BESIDE.get((command, option), COMMON.get(command, ()))
    if beside and (command, option) in BESIDE:
        beside = (*COMMON.get(command, ()), *beside)
    with time_limit(60):
        done = CliRunner().invoke(app, [*command.split(), *beside, f"{option}={value}"])
    unforeseen = done.exception is not None and not isinstance(done.exception, SystemExit)
    assert not unforeseen, repr(done.exception)
    said = " ".join(done.output.split())
    assert done.exit_code == exit_codes.BAD_ARGUMENTS, said
    # argparse prints the names of all options before its complaint.
    complaint = said.rpartition(f"moegate {command}: ")[2] if command == "bench" else said
    names = (
        option,
        *((f"{option[2:]}:",) if command in ("bench", "gate") else ()),
        option.lstrip("-").replace("-", "_"),
        *ALSO_CALLED.get((command, option), ()),
    )
    assert any(name in complaint for name in names)
    assert "\x1b" not in done.output.replace("\x1b[31m" if "\x1b" not in value else "\0", "")
    assert "Traceback" not in said
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "file.json").read_text() == "{}"


def _commands() -> dict[str, set[str]]:
    """The options of every command that take a value."""
    found: dict[str, set[str]] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        for name, inside in getattr(command, "commands", {}).items():
            walk(inside, (*words, name))
        if not hasattr(command, "commands"):
            options = [each for each in command.params if each.opts[0].startswith("-")]
            found[" ".join(words)] = {each.opts[0] for each in options if not getattr(each, "is_flag", False)}

    walk(typer.main.get_command(app), ())
    named = [action for action in bench_main.command_line()._actions if action.nargs != 0]
    found["bench"] = {action.option_strings[-1] for action in named}
    return found


def test_every_option_has_bad_values() -> None:
    assert {command: set(options) for command, options in OPTIONS.items()} == _commands()


# --- the environment ---------------------------------------------------------------------------------------------

H200 = replace(Platform.parse("cuda:9.0"), name="NVIDIA H200")


def _order(variable: str, value: str) -> Any:
    setting = shared_experts.SharedExpertsSetting()
    return shared_experts.shared_experts_order(
        setting, H200, has_auxiliary_stream=True, num_tokens=4, environment={variable: value}
    )


def _history(variable: str, value: str) -> None:
    """`moegate history list`, whose error its message is."""
    Path("file.json").write_text("{}")
    os.environ[variable] = value
    try:
        done = CliRunner().invoke(app, ["history", "list"])
    finally:
        del os.environ[variable]
    if done.exit_code == exit_codes.BAD_ARGUMENTS:
        raise ValueError(" ".join(done.output.split()))


# By variable, what reads it, and values that must be refused.
VARIABLES: dict[str, tuple[Callable[[str, str], Any], tuple[str, ...]]] = {
    "MOEGATE_BACKEND": (lambda variable, value: select.parse_request(None, {variable: value}), NAMES),
    "MOEGATE_TUNED_CONFIG_FOLDER": (
        lambda variable, value: lookup.config_folders({variable: value}),
        ("no/such/folder", __file__, "a\0b", "x" * 5000, "~nosuchuser/x", "\x1b[2J"),
    ),
    "MOEGATE_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD": (
        _order,
        ("many", "-1", "1.5", "nan", LONG, "1 2", "\u0661", "1\x1b[2J"),
    ),
    "MOEGATE_DISABLE_SHARED_EXPERTS_STREAM": (_order, ("maybe", "2", "\x1b[2J", "tru")),
    "MOEGATE_KERNEL_FORMS": (
        lambda variable, value: kernel_form.form_choice({variable: value}),
        ("on", "1", "fastest", "sorted", "\x1b[2J", LONG),
    ),
    "MOEGATE_REPLAY": (lambda variable, value: switch(variable, {variable: value}), ("maybe", "2", "\x1b[2J", "tru")),
    "MOEGATE_HISTORY": (_history, ("file.json", "\x1b[2J")),
    "MOEGATE_DEBUG": (lambda variable, value: switch(variable, {variable: value}), ("maybe", "2", "\x1b[2J", "tru")),
}


@pytest.mark.parametrize(
    ("variable", "value"),
    [(variable, value) for variable, (_, values) in VARIABLES.items() for value in values],
    ids=ascii,
)
def test_a_bad_variable_is_refused_by_name(
    variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not refusal_of(lambda: VARIABLES[variable][0](variable, value), variable)


def test_every_variable_that_is_read_has_bad_values() -> None:
    names = set()
    for room in ("impl", "conformance", "bench", "cli", "reference"):
        for file in (ROOT / room).rglob("*.py"):
            names |= set(re.findall(r"\bMOEGATE_[A-Z_]+", file.read_text()))
    assert names == set(VARIABLES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_tuning_without_a_gpu_says_so_once_its_arguments_are_right() -> None:
    done = CliRunner().invoke(app, ["tune", "--model", "qwen3-30b-a3b"])
    assert done.exit_code == exit_codes.NOTHING_DONE
