"""Bad command-line options and environment variables: refused by name with exit code 4, and nothing is written.

An option or a variable that joins without bad values of its own fails a test here.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from moegate import exit_codes
from moegate.bench import __main__ as bench_main
from moegate.conformance.properties.bad_input import refusal_of, time_limit
from moegate.impl import shared_experts
from moegate.impl.checks import switch
from moegate.impl.oracle import select
from moegate.impl.platform import Platform
from moegate.impl.tuning import lookup
from moegate.main import app

ROOT = Path(__file__).resolve().parents[1]
LONG = "9" * 5000

JSON = ("", ".", "no/such/folder/file.json", "a\0b", "x" * 300, "file.json/below", "\x1b[2J/x.json")
_INT = ("much", "", "1.5", "nan", "1e3", LONG)
_COUNT = (*_INT, "0", "-1", "-9223372036854775809")
_NUMBER = ("much", "", "nan", "inf", "-inf", "0", "-1", "1,5")
_NAME = ("", "nosuch", "\x1b[31mred", "../../etc/passwd", "a b", "a\nb")

# By command and option, values that must be refused. What a child of the command refuses takes seconds: one of each.
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "check": {
        "--subject": ("nosuch.py:Subject",),
        "--device": _NAME,
        "--profile": _NAME,
        "--workers": (*_INT, "-1", "100000", LONG),
        "--scale": _NUMBER,
        "--spec": ("__import__('os').abort()",),
        "--select": ("not (",),
        "--json": JSON,
    },
    "explain": {
        "--platform": (*_NAME, "cuda", "cuda:1.0", "cuda:9", "rocm:gfx1", "cpu:0", f"cuda:{LONG}.0"),
        "--dtype": _NAME,
        "--block-shape": (*_NAME, "128", "128,128,128", "128,", "-1,128", "1.5,128", "128,100", f"{LONG},128"),
        "--activation": _NAME,
        "--dp": _COUNT,
        "--ep": (*_COUNT, "129"),
        "--tp": (*_COUNT, "5"),
        "--experts": _COUNT,
        "--top-k": (*_COUNT, "129"),
        "--hidden": _COUNT,
        "--intermediate": _COUNT,
        "--backend": _NAME[1:],
        "--without": _NAME,
        "--json": JSON,
    },
    "tune": {
        "--model": _NAME,
        "--shape": (*_NAME, "E=8", "E=8,N=64,H=64", "E=0,N=64,H=64,top_k=2", "E=8,N=64,H=64,top_k=9", f"E={LONG},N=1"),
        "--tokens": (*_NAME, "0", "-1", "1,,2", "1.5", LONG, "1;2"),
        "--dtype": _NAME,
        "--device": ("", "nosuch", "cpu:x", "\x1b[31m", "meta"),
        "--minutes": _NUMBER,
        "--limit": _COUNT,
        "--output": (__file__, "a\0b", f"{__file__}/below"),
        "--json": JSON,
    },
    "doctor": {"--json": JSON},
    "bench": {
        "--models": _NAME,
        "--tokens": (*_NAME, "0", "-1", "1,,2", "1.5", LONG),
        "--routing": (*_NAME, "zipf", "zipfx", "zipf-1", "zipfnan", "zipfinf"),
        "--dtype": _NAME,
        "--device": ("nosuch", "cpu:x", "\x1b[31m", "meta"),
        "--peer": (*_NAME, "nosuch.py:f", f"{__file__}:nosuch"),
        "--budget": _NUMBER,
        "--lora": (*_COUNT, "257"),
        "--adapters": _COUNT,
        "--simulate-ep": (*_NAME, "1", "0", "-1", "257", "2,,4", LONG),
        "--link-bandwidth": _NUMBER,
        "--link-latency": ("much", "", "nan", "inf", "-1"),
        "--json": JSON,
    },
}
# What else must be there for an option to be looked at.
BESIDE = {
    ("tune", "--model"): (),
    ("tune", "--shape"): (),
    ("bench", "--simulate-ep"): ("--link-bandwidth", "400", "--link-latency", "10"),
    ("bench", "--link-bandwidth"): ("--simulate-ep", "2", "--link-latency", "10"),
    ("bench", "--link-latency"): ("--simulate-ep", "2", "--link-bandwidth", "400"),
    ("bench", "--adapters"): ("--lora", "16"),
}
# How messages may call an option besides.
ALSO_CALLED = {
    ("check", "--select"): ("'-k'",),
    ("explain", "--dp"): ("dp_size",),
    ("explain", "--ep"): ("ep_size",),
    ("explain", "--tp"): ("tp_size",),
    ("explain", "--experts"): ("num_experts",),
    ("explain", "--hidden"): ("hidden_size",),
    ("explain", "--intermediate"): ("intermediate_size",),
    ("bench", "--link-bandwidth"): ("link-bandwidth",),
    ("bench", "--link-latency"): ("link-latency",),
    ("bench", "--simulate-ep"): ("simulate-ep",),
    ("bench", "--models"): ("model",),
    ("bench", "--lora"): ("rank",),
    ("bench", "--routing"): ("exponent",),
}
COMMON = {
    "check": ("--device", "cpu", "-n", "1"),
    "tune": ("--model", "qwen3-30b-a3b"),
    "bench": ("--models", "qwen3-30b-a3b", "--tokens", "1", "--device", "cpu"),
}


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
    (tmp_path / "file.json").write_text("{}")
    beside = BESIDE.get((command, option), COMMON.get(command, ()))
    if beside and (command, option) in BESIDE:
        beside = (*COMMON.get(command, ()), *beside)
    with time_limit(60):
        done = CliRunner().invoke(app, [command, *beside, f"{option}={value}"])
    unforeseen = done.exception is not None and not isinstance(done.exception, SystemExit)
    assert not unforeseen, repr(done.exception)
    said = " ".join(done.output.split())
    assert done.exit_code == exit_codes.BAD_ARGUMENTS, said
    # argparse prints the names of all options before its complaint.
    complaint = said.rpartition(f"moegate {command}: ")[2] if command == "bench" else said
    names = (option, option.lstrip("-").replace("-", "_"), *ALSO_CALLED.get((command, option), ()))
    assert any(name in complaint for name in names)
    assert "\x1b" not in done.output.replace("\x1b[31m" if "\x1b" not in value else "\0", "")
    assert "Traceback" not in said
    assert sorted(os.listdir(tmp_path)) == ["file.json"]
    assert (tmp_path / "file.json").read_text() == "{}"


def _options_of(command: str) -> set[str]:
    if command == "bench":
        parser: argparse.ArgumentParser = bench_main.command_line()
        named = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
        return {action.option_strings[-1] for action in named if action.nargs != 0}
    parameters = typer.main.get_command(app).commands[command].params  # pyright: ignore
    return {parameter.opts[0] for parameter in parameters if not getattr(parameter, "is_flag", False)} - {"--help"}


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_every_option_has_bad_values(command: str) -> None:
    assert set(OPTIONS.get(command, {})) == _options_of(command)


# --- the environment ---------------------------------------------------------------------------------------------

H200 = replace(Platform.parse("cuda:9.0"), name="NVIDIA H200")


def _order(variable: str, value: str) -> Any:
    setting = shared_experts.SharedExpertsSetting()
    return shared_experts.shared_experts_order(
        setting, H200, has_auxiliary_stream=True, num_tokens=4, environment={variable: value}
    )


# By variable, what reads it, and values that must be refused.
VARIABLES: dict[str, tuple[Callable[[str, str], Any], tuple[str, ...]]] = {
    "MOEGATE_BACKEND": (lambda variable, value: select.parse_request(None, {variable: value}), _NAME[1:]),
    "MOEGATE_TUNED_CONFIG_FOLDER": (
        lambda variable, value: lookup.config_folders({variable: value}),
        ("no/such/folder", __file__, "a\0b", "x" * 5000, "~nosuchuser/x", "\x1b[2J"),
    ),
    "MOEGATE_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD": (
        _order,
        ("many", "-1", "1.5", "nan", LONG, "1 2", "\u0661", "1\x1b[2J"),
    ),
    "MOEGATE_DISABLE_SHARED_EXPERTS_STREAM": (_order, ("maybe", "2", "\x1b[2J", "tru")),
    "MOEGATE_DEBUG": (lambda variable, value: switch(variable, {variable: value}), ("maybe", "2", "\x1b[2J", "tru")),
}


@pytest.mark.parametrize(
    ("variable", "value"),
    [(variable, value) for variable, (_, values) in VARIABLES.items() for value in values],
    ids=ascii,
)
def test_a_bad_variable_is_refused_by_name(variable: str, value: str) -> None:
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
