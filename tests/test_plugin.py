"""The pytest plugin as a user meets it, in processes of its own."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked_runs import TRANSFORMERS, run_forked

from moegate.conformance import plugin
from moegate.conformance.spec import ExpertsSpec, parse_spec

# A user's own layer: one class, one call.
MINE = '''
import os
import time

import torch
import torch.nn.functional as F

from moegate.conformance.numerics import Numerics
from moegate.conformance.subject import Capabilities, Subject


class Mine(Subject):
    name = "mine"
    variants = ("honest",)
    capabilities = Capabilities(("cpu",), ("float32",), maps=("none",), logits=("unit",), weight_on_input=False)
    numerics = Numerics(weighted="float32")

    def __init__(self):
        self.kept = {}

    def experts(self, case, variant):
        if variant == "raises":
            raise NotImplementedError("no such layer")
        if variant == "crashes" and case.num_tokens > 3:
            os.abort()
        if variant == "hangs" and case.num_tokens > 3:
            time.sleep(1000)
        if variant == "keeps_state":
            shapes = (case.w13.shape, case.hidden_states.shape)
            return self.kept.setdefault(shapes, self.computed(case, variant))
        return None if variant == "returns_none" else self.computed(case, variant)

    def computed(self, case, variant):
        x, out = case.hidden_states, torch.zeros_like(case.hidden_states)
        for expert in range(1 if variant == "drops_an_expert" else 0, case.num_experts):
            token, slot = (case.topk_ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], case.w13[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, case.w2[expert])
            out.index_add_(0, token, y * case.topk_weights[token, slot, None])
        if variant == "writes_its_input":
            x.zero_()
        if variant == "returns_its_input":
            return x.copy_(out)
        if variant == "wrong_dtype":
            return out.double()
        return out[:, :-1] if variant == "wrong_shape" else out


class Wrong(Mine):
    variants = (
        *("honest", "drops_an_expert", "wrong_shape", "wrong_dtype", "writes_its_input", "returns_its_input"),
        *("raises", "returns_none", "keeps_state"),
    )


class Deadly(Mine):
    variants = ("honest", "crashes", "hangs")


class Dying(Mine):
    variants = ("honest", "crashes")


class Stuck(Mine):
    variants = ("drops_an_expert", "hangs")


class Unready(Mine):
    """What the suite asks of it beside its calls is an error."""

    def configs(self):
        raise RuntimeError("no folder for its files")


class Forgotten(Mine):
    """Routes, and declares experts that the run below never asks for."""

    def route(self, case, variant):
        ids = case.router_logits.sort(dim=-1, descending=True, stable=True).indices[:, : case.top_k]
        weights = torch.softmax(case.router_logits, dim=-1).gather(1, ids)
        return weights / weights.sum(1, keepdim=True) if case.renormalize else weights, ids.int()
'''
EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "my_moe.py"
SPEC = ExpertsSpec(M=6, H=16, I=8, E=3, top_k=2, dtype="float32")
SUITE = ("--pyargs", "moegate.conformance", "--moegate-device", "cpu")
MOEGATE = (*SUITE, "--moegate-scale", "0.05", "-k", "experts_stay and float16 or test_routing")
RUNS = {
    "trivial": ("test_trivial.py",),
    "single": (*MOEGATE, "--moegate-report", "single.json"),
    "two workers": (*MOEGATE, "--moegate-report", "workers.json", "-n", "2"),
    "honest": (*SUITE, "--moegate-subject", "mine.py:Mine", "--moegate-scale", "0.05"),
    "wrong": (
        *SUITE,
        "--moegate-subject",
        "mine.py:Wrong",
        "--moegate-spec",
        repr(SPEC),
        "--moegate-report",
        "wrong.json",
    ),
    "unready": (
        *SUITE,
        *("--moegate-subject", "mine.py:Unready", "--moegate-scale", "0.05"),
        *("-k", "test_files_are_found or stay and float32 and one", "--moegate-report", "unready.json"),
    ),
    "dying": (
        *SUITE,
        *("--moegate-subject", "mine.py:Dying", "--moegate-scale", "0.05", "-n", "1"),
        *("-k", "stay and float32 and many", "--moegate-report", "dying.json"),
    ),
    "all skipped": (*SUITE, "--moegate-subject", "mine.py:Mine", "-k", "test_align or test_api"),
    "unjudged": (*SUITE, "--moegate-subject", "mine.py:Forgotten", "--ignore-glob", "/*/test_[aemo]*.py"),
    "deadly": (
        *SUITE,
        *("--moegate-subject", "mine.py:Deadly", "--moegate-isolate", "--moegate-timeout", "6"),
        *("--moegate-scale", "0.05", "-k", "stay and float32 and many", "--moegate-report", "deadly.json"),
    ),
    "example": (*SUITE, "--moegate-subject", f"{EXAMPLE}:WrongMoE", "-k", "stay", "--moegate-report", "example.json"),
    "transformers": (*SUITE, "--moegate-subject", "transformers", "--moegate-scale", "0.05", "-k", "not api"),
    "deepseek_v3": (*SUITE, "--moegate-subject", "transformers:deepseek_v3", "--moegate-scale", "0.2", "-k", "route"),
    "gpt_oss": (*SUITE, "--moegate-subject", "transformers:gpt_oss", "--moegate-scale", "0.05", "-k", "meta or stay"),
    "not installed": (*SUITE, "--moegate-subject", "sglang"),
    "no such file": (*SUITE, "--moegate-subject", "yours.py:Mine", "-n", "1"),
}
TRIVIAL = """
import sys

def test_nothing_heavy_is_loaded():
    heavy = {"torch", "triton", "hypothesis", "numpy"} & set(sys.modules)
    assert "moegate.conformance.plugin" in sys.modules
    assert not heavy, heavy
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Exit code, output and report of each run."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine.py").write_text(MINE)
    (folder / "test_trivial.py").write_text(TRIVIAL)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop("TRITON_INTERPRET", None)

    arguments = {name: ("-q", "-rs", "--tb=short", "-p", "no:cacheprovider", *RUNS[name]) for name in RUNS}
    # The one that says what a run loads starts from nothing.
    own = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments.pop("trivial")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    forked = run_forked(arguments, folder, environment, more=TRANSFORMERS)
    done = {"trivial": (own.returncode, own.stdout + own.stderr), **forked}

    def result(name, code, text):
        options = dict(zip(RUNS[name], RUNS[name][1:], strict=False))
        report = folder / options.get("--moegate-report", "none")
        report = json.loads(report.read_text()) if report.exists() else None
        return SimpleNamespace(code=code, text=text, report=report)

    return {name: result(name, *done[name]) for name in RUNS}


def findings(run):
    return {row["id"]: row["finding"] for row in run.report["properties"] if row["verdict"] == "violated"}


def test_a_run_of_other_tests_loads_neither_torch_nor_triton_nor_hypothesis(runs):
    assert runs["trivial"].code == 0, runs["trivial"].text
    assert "= moegate =" not in runs["trivial"].text


def test_without_the_interpreter_triton_is_skipped_with_the_command_to_use(runs):
    run = runs["single"]
    assert run.code == 0, run.text
    assert re.search(r"SKIPPED.*run `moegate check`, or set TRITON_INTERPRET=1", run.text), run.text
    assert set(run.report["executions_by_variant"]) == {"cpu"}
    assert {"NUM-01", "ROUTE-04", "PATH-02"} <= {row["id"] for row in run.report["properties"]}


def test_two_workers_judge_what_one_process_judges(runs):
    one, two = runs["single"], runs["two workers"]
    assert two.code == 0, two.text
    assert [(row["id"], row["cases"], row["budget_used"]) for row in two.report["properties"]] == [
        (row["id"], row["cases"], row["budget_used"]) for row in one.report["properties"]
    ]
    for key in ("executions", "feature_pairs", "subject", "verdict"):
        assert two.report[key] == one.report[key], key


def test_a_users_own_layer_in_a_few_lines_is_judged_and_passes(runs):
    run = runs["honest"]
    assert run.code == 0, run.text
    assert re.search(r"NUM-01 +\d+ cases .* holds", run.text)
    assert "SKIPPED" in run.text
    assert "mine (honest) does not define align" in run.text


def test_each_wrong_layer_is_found_under_the_right_property_beside_an_honest_one(runs):
    run = runs["wrong"]
    assert run.code == 1
    raised = {}
    for variant, finding in re.findall(
        r"_table\[(\w+)-float32-\w+\] _+\n.*?^E +(?:[\w.]+: )?([A-Z]+-\d\d):", run.text, re.S | re.M
    ):
        raised.setdefault(variant, set()).add(finding)
    assert raised == {
        "drops_an_expert": {"NUM-01"},
        "wrong_shape": {"HYGIENE-01"},
        "wrong_dtype": {"HYGIENE-01"},
        "raises": {"SUBJECT-01"},
        "returns_none": {"SUBJECT-01"},
        "writes_its_input": {"HYGIENE-02"},
        "returns_its_input": {"HYGIENE-02"},
        "keeps_state": {"HYGIENE-07"},
    }
    found = findings(run)
    assert "shared with ['hidden_states']" in found["HYGIENE-03"]
    assert "FAILED" not in "".join(line for line in run.text.splitlines() if "[honest-" in line)


def test_a_layer_that_keeps_something_for_its_next_call_is_found_beside_a_fresh_one(runs):
    assert re.search(r"keeps_nothing_for_the_next\[keeps_state\] _+\n.*?SUBJECT-04: ", runs["wrong"].text, re.S)
    assert "keeps_nothing_for_the_next[honest]" not in runs["wrong"].text
    assert "elements differ: token" in findings(runs["wrong"])["SUBJECT-04"]


def test_a_finding_says_what_must_hold_and_how_to_see_it_again(runs):
    text = findings(runs["wrong"])["NUM-01"]
    assert text.startswith("NUM-01: every element is within its error budget of the float64 reference\n")
    assert f"spec:   {SPEC!r}" in text
    words = shlex.split(text.split("replay: ")[1])
    assert words[:4] == ["moegate", "check", "--subject", "mine.py:Wrong"]
    assert parse_spec(words[-1]) == SPEC
    assert "NUM-01: every element" in runs["wrong"].text


def test_a_spec_runs_only_the_tests_that_take_it(runs):
    families = {row["id"].split("-")[0] for row in runs["wrong"].report["properties"]}
    assert families == {"NUM", "META", "HYGIENE", "SUBJECT"}
    assert set(re.findall(r"_table\[\w+-(\w+)-\w+\]", runs["wrong"].text)) == {"float32"}


def only_reason(run):
    """Why a run failed that found nothing else."""
    assert run.code == 1, run.text
    assert run.report["verdict"] == "errors"
    (reason,) = run.report["errors"]
    return reason


def test_a_test_that_fails_without_a_finding_fails_the_run_and_says_why(runs):
    run = runs["unready"]
    reason = only_reason(run)
    assert re.search(r"test_files_are_found\S* ended with RuntimeError: no folder for its files", reason), reason
    assert not findings(run)
    assert f"ERROR: {reason}" in run.text


def test_a_test_in_which_a_worker_dies_fails_the_run_and_is_named(runs):
    run = runs["dying"]
    reason = only_reason(run)
    assert re.search(r"stay_within_budget\S*\[crashes-float32-\S*\] ended its worker's process", reason), reason
    assert run.report["executions_by_variant"]["honest"]


def test_findings_alone_leave_a_run_violated_and_no_error(runs):
    assert runs["wrong"].report["verdict"] == "violated"
    assert runs["wrong"].report["errors"] == []


def test_a_run_in_which_everything_is_skipped_fails(runs):
    run = runs["all skipped"]
    assert run.code == 1, run.text
    assert "NOT JUDGED: nothing was judged" in run.text


def test_a_run_that_never_judges_a_declared_property_fails(runs):
    run = runs["unjudged"]
    assert run.code == 1, run.text
    assert re.search(r"NOT JUDGED: never judged, though declared: .*NUM-01", run.text), run.text
    assert "failed" not in run.text.splitlines()[-1]


def test_a_subject_that_is_not_there_is_a_usage_error_by_name_even_from_a_worker(runs):
    run = runs["no such file"]
    assert run.code == pytest.ExitCode.USAGE_ERROR, run.text
    assert "ERROR: moegate: subject: expected a file, got 'yours.py'" in run.text
    assert "Traceback" not in run.text


def test_the_wrong_layer_of_the_docs_is_found_on_a_few_tokens(runs):
    assert len(EXAMPLE.read_text().splitlines()) < 60
    assert runs["example"].code == 1, runs["example"].text
    assert "NUM-01" in findings(runs["example"])
    smallest = next(row["spec"] for row in runs["example"].report["properties"] if row["id"] == "NUM-01")
    assert parse_spec(smallest).M <= 3


def test_a_crash_and_a_hang_of_an_isolated_layer_are_findings_and_the_run_goes_on(runs):
    run = runs["deadly"]
    assert run.code == 1, run.text
    found = findings(run)
    assert set(found) == {"SUBJECT-02", "SUBJECT-03"}, run.text
    assert "experts: the process died by SIGABRT" in found["SUBJECT-02"]
    assert "experts: no result after 6 s" in found["SUBJECT-03"]
    crashed = parse_spec(next(row["spec"] for row in run.report["properties"] if row["id"] == "SUBJECT-02"))
    assert crashed.M == 4, "a crash is shrunk"
    assert run.report["executions_by_variant"]["honest"] > 4


@pytest.mark.parametrize("model", ["transformers", "deepseek_v3", "gpt_oss"])
def test_the_blocks_of_transformers_hold(runs, model):
    run = runs[model]
    assert run.code == 0, run.text
    family = "ROUTE-06" if model == "deepseek_v3" else "NUM-01"
    assert re.search(rf"{family} +\d+ cases .* holds", run.text)


def test_what_is_known_of_a_subject_is_shown_and_does_not_fail_the_run(runs):
    assert re.search(r"ROUTE-05 +\d+ cases .* known ", runs["transformers"].text), runs["transformers"].text


def test_a_subject_that_is_not_installed_ends_the_run_with_3_and_the_way_to_install_it(runs):
    run = runs["not installed"]
    assert run.code == 3, run.text
    assert "sglang is not installed here: pip install 'sglang[all]'" in run.text
    assert "Traceback" not in run.text


def workers(monkeypatch, number, *, visible, device=None):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    specs = [SimpleNamespace(env={}) for _ in range(number)]
    config = SimpleNamespace(getoption={"moegate_device": device}.get)
    plugin.pytest_xdist_setupnodes(config, specs)
    return [spec.env.get("CUDA_VISIBLE_DEVICES") for spec in specs], plugin.pytest_xdist_auto_num_workers(config)


def test_workers_take_the_gpus_in_turn(monkeypatch):
    assert workers(monkeypatch, 5, visible="2,5,GPU-ab") == (["2", "5", "GPU-ab", "2", "5"], None)
    assert workers(monkeypatch, 1, visible="0,1", device="cuda") == (["0"], 2)


@pytest.mark.parametrize(("visible", "device"), [("0,1", "cpu"), ("", None), ("-1", "cuda")])
def test_workers_without_a_gpu_are_left_alone(monkeypatch, visible, device):
    assert workers(monkeypatch, 2, visible=visible, device=device) == ([None, None], None)


@pytest.fixture
def interruptible():
    """Processes started here take an interrupt, though a shell that runs the tests behind it has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_what_a_worker_has_judged_is_there_when_the_run_is_interrupted(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    arguments = (*SUITE, "--moegate-subject", "mine.py:Stuck", "-k", "stay and many", "--moegate-scale", "0.05")
    arguments += ("-n", "1", "-v", "--moegate-report", "stuck.json", "-p", "no:cacheprovider")
    command = [sys.executable, "-u", "-m", "pytest", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if "FAILED" in line:  # what follows never ends
                run.send_signal(signal.SIGINT)
                break
        try:
            rest = run.communicate(timeout=60)[0]
        finally:
            run.kill()
    assert run.returncode == 2, rest
    found = {row["id"]: row["verdict"] for row in json.loads((tmp_path / "stuck.json").read_text())["properties"]}
    assert found["NUM-01"] == "violated"
