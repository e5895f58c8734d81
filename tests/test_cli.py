"""The command line: exit codes, machine-readable output, and arguments refused by name."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from moegate import exit_codes
from moegate.main import app

WRONG = '''
from moegate.conformance.subjects.eager import EagerSubject


class Wrong(EagerSubject):
    """Loses a column."""

    name = "wrong"

    def experts(self, case, variant):
        return super().experts(case, variant)[:, 1:]


class WithoutExperts(EagerSubject):
    name = "without experts"

    def facets(self, variant):
        return ("route",)
'''


def moegate(*arguments):
    """A command run in this process; `moegate check` runs the suite in another."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    unforeseen = done.exception is not None and not isinstance(done.exception, SystemExit)
    assert not unforeseen, done.exception
    return SimpleNamespace(code=done.exit_code, out=done.stdout, text=" ".join(done.output.split()))


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder with a user's subjects."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine.py").write_text(WRONG)
    return folder


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_each_command_explains_itself(command):
    done = moegate(command, "--help")
    assert done.code == 0
    assert f"sage: moegate {command}" in done.text  # argparse writes it small
    assert command in moegate("--help").text


@pytest.mark.parametrize(
    "arguments",
    [
        ("--profile", "fast"),
        ("--device", "tpu"),
        ("--scale", "0"),
        ("--scale", "much"),
        ("--workers", "-1"),
        ("--subjects", "moegate"),
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_with_4_and_are_named(arguments):
    done = moegate("check", *arguments)
    assert done.code == exit_codes.BAD_ARGUMENTS
    assert arguments[0] in done.text


def test_an_unknown_command_is_a_bad_argument():
    done = moegate("chekc")
    assert done.code == exit_codes.BAD_ARGUMENTS
    assert "chekc" in done.text


def test_a_subject_that_is_not_there_is_a_bad_argument(user):
    done = moegate("check", "--device", "cpu", "-n", 1, "--subject", user / "yours.py:Wrong")
    assert done.code == exit_codes.BAD_ARGUMENTS
    assert "yours.py" in done.text


def test_a_finding_exits_with_1_and_json_on_standard_output_is_all_there_is(user):
    """The installed command, in a process of its own, from the user's folder."""
    command = [shutil.which("moegate") or sys.executable, *([] if shutil.which("moegate") else ["-m", "moegate"])]
    options = ["--subject", "mine.py:Wrong", "--device", "cpu", "--scale", "0.1", "-n", "1", "-k", "float32-many"]
    options += ["--junit", "report.xml", "--markdown", "report.md", "--emit-repro", "bad.py"]
    done = subprocess.run(
        [*command, "check", *options, "--json", "-"], cwd=user, capture_output=True, text=True, check=False
    )
    assert done.returncode == exit_codes.FINDING, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == 2
    assert (report["verdict"], report["subject"], report["device"]) == ("violated", "wrong", "cpu")
    assert report["executions"] > 0
    assert report["properties"]
    for row in report["properties"]:
        assert {"id", "cases", "budget_used", "verdict"} <= set(row)
        assert row["verdict"] in ("holds", "violated")
        assert row["cases"] > 0
    violated = {row["id"] for row in report["properties"] if row["verdict"] == "violated"}
    assert violated == {"HYGIENE-01"}
    said = " ".join(done.stderr.split())
    assert "HYGIENE-01: the result is [M, H] in the dtype and on the device of hidden_states" in said
    assert "replay: moegate check --subject mine.py:Wrong" in said
    assert "verdict: violated" in said
    assert "HYGIENE-01" in (user / "report.xml").read_text()
    assert "**HYGIENE-01**" in (user / "report.md").read_text()
    assert "bad.py is not written: no finding is a call of the experts whose elements or rows are off" in said


def test_what_cannot_be_judged_exits_with_3(user):
    select = "experts_stay and bfloat16"
    done = moegate("check", "--device", "cpu", "-n", 1, "--subject", user / "mine.py:WithoutExperts", "-k", select)
    assert done.code == exit_codes.NOTHING_DONE, done.text
    assert "nothing was judged" in done.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_exits_with_3():
    done = moegate("check", "--device", "cuda")
    assert done.code == exit_codes.NOTHING_DONE
    assert "--device cuda" in done.text


def test_the_doctors_json_says_what_runs_here(tmp_path):
    done = moegate("doctor", "--json", "-")
    assert done.code == exit_codes.HOLDS
    report = json.loads(done.out)
    assert report["schema"] == 1
    lines = {line["name"]: line for line in report["lines"]}
    assert lines["torch"] == {"name": "torch", "state": "ok", "detail": torch.__version__}
    assert {line["state"] for line in report["lines"]} <= {"ok", "missing", "broken"}
    moegate("doctor", "--json", tmp_path / "doctor.json")
    assert json.loads((tmp_path / "doctor.json").read_text()) == report
