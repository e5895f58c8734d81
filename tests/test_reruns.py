"""A fixed set of cases, called again and again: one call in many that differs by a bit is found and counted."""

import json
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from moegate.conformance.catalogue import due
from moegate.conformance.numerics import Numerics
from moegate.conformance.reruns import CASES, fixed_cases, judge_reruns, reruns_asked
from moegate.conformance.selection import SELECTION
from moegate.conformance.subject import Capabilities
from moegate.conformance.subjects.eager import EagerSubject
from moegate.main import app

FLAKY = '''
from moegate.conformance.subject import Capabilities
from moegate.conformance.subjects.eager import EagerSubject


class Flaky(EagerSubject):
    """Every seventh call is off by one bit."""

    name = "flaky"
    capabilities = Capabilities(dtypes=("float32",), maps=("none",), padded_rows=False)
    calls = 0

    def facets(self, variant):
        return ("experts",)

    def experts(self, case, variant):
        self.calls += 1
        output = super().experts(case, variant)
        if self.calls % 7 == 0:
            output.view(torch.int32)[-1, -1] ^= 1
        return output
'''


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(SELECTION, "reruns", 9)


def test_the_cases_are_the_same_each_time_and_hold_all_schemes_and_activations(asked):
    capabilities = EagerSubject().capabilities
    for facet, count in CASES.items():
        cases = fixed_cases(facet, "cpu", capabilities)
        assert cases == fixed_cases(facet, "cpu", capabilities)
        assert len(set(cases)) == count
    experts = fixed_cases("experts", "cpu", capabilities)
    assert {case.scheme for case in experts} == set(capabilities.schemes)
    assert {case.activation for case in experts} == set(capabilities.activations)


def test_few_declared_features_leave_fewer_cases(asked):
    one = Capabilities(dtypes=("float32",), maps=("none",), padded_rows=False)
    assert 0 < len(fixed_cases("experts", "cpu", one)) <= CASES["experts"]


def test_a_run_that_asks_for_no_reruns_has_a_few():
    assert SELECTION.reruns is None
    assert reruns_asked() == 3
    assert len(fixed_cases("experts", "cpu", EagerSubject().capabilities)) == 4


def test_one_call_that_differs_by_a_bit_is_found_with_its_number():
    calls = iter(range(100))

    def run():
        output = torch.ones(3, 4)
        if next(calls) == 5:
            output.view(torch.int32)[1, 2] += 1
        return (torch.zeros(2), output)

    facts = Counter()
    verdict = judge_reruns(run, 10, facts)
    assert not verdict.holds
    assert verdict.property.id == "HYGIENE-08"
    assert verdict.detail == (
        "1 of 10 calls differ from the first; call 6: 1 of 12 elements, first element 6: 1.0, now 1.0000001192092896"
    )
    assert facts == {"reruns: calls compared": 10, "reruns: calls that differed": 1}


@pytest.mark.parametrize(
    ("later", "holds"),
    [
        (torch.tensor([float("nan"), 0.0]), True),
        (torch.tensor([float("nan"), -0.0]), False),
        (torch.tensor([float("nan")]), False),
        (torch.tensor([float("nan"), 0.0], dtype=torch.float64), False),
    ],
)
def test_bits_are_compared_and_not_numbers(later, holds):
    results = iter([torch.tensor([float("nan"), 0.0]), later])
    assert judge_reruns(lambda: (next(results),), 1, Counter()).holds is holds


def test_memory_that_was_not_written_differs_between_calls():
    assert not judge_reruns(lambda: (torch.empty(64).nan_to_num(nan=1e30),), 2, Counter()).holds


def test_only_what_declares_determinism_is_judged_by_it():
    class Unordered(EagerSubject):
        numerics = Numerics(repeatable=False)

    assert {"HYGIENE-04", "HYGIENE-08"} <= {prop.id for prop in due(EagerSubject(), "cpu")}
    assert not {"HYGIENE-04", "HYGIENE-08"} & {prop.id for prop in due(Unordered(), "cpu")}


def test_the_command_runs_nothing_else_and_counts(tmp_path):
    (tmp_path / "mine.py").write_text("import torch\n" + FLAKY)
    command = ["check", "--subject", f"{tmp_path}/mine.py:Flaky", "--device", "cpu", "--reruns", "13", "-n", "1"]
    done = CliRunner().invoke(app, [*command, "--json", f"{tmp_path}/report.json"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert done.exit_code == 1, done.output
    rows = {row["id"]: row for row in report["properties"]}
    assert set(rows) == {"HYGIENE-08", "SUBJECT-01"}
    cases = rows["HYGIENE-08"]["cases"]
    assert rows["HYGIENE-08"]["violated"] == cases > 1
    assert report["executions"] == 14 * cases
    assert report["facts"]["reruns: calls compared"] == 13 * cases
    assert cases <= report["facts"]["reruns: calls that differed"] < 13 * cases
    assert "--reruns 13" in rows["HYGIENE-08"]["replay"]
