"""One report in every format; its data keep to the schema."""

import json
from importlib.resources import files
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from test_known import BEFORE, CRASH, WRONG

from moegate.conformance import false_alarms
from moegate.conformance import report as report_module
from moegate.conformance.evidence import Blame, Evidence
from moegate.conformance.judge import Finding, Ledger
from moegate.conformance.known import KnownFailures, parse_known
from moegate.conformance.properties.hygiene import FORM
from moegate.conformance.properties.num import ELEMENT, ROW_RMS
from moegate.conformance.report import as_json, stale_entries
from moegate.conformance.report_formats import as_junit, as_lines, as_markdown, write_report
from moegate.conformance.spec import ExpertsSpec
from moegate.conformance.subjects.eager import EagerSubject

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is a tool of development")
SCHEMA = json.loads(files("moegate.conformance").joinpath("report.schema.json").read_text())
SPEC = ExpertsSpec(M=1, H=16, I=8, E=2, top_k=1)
WORST = Evidence(
    *(0, 3, 0.5, float("nan"), float("inf"), 16, 16, 1, 0, 0, None),
    experts=((1,), (1,)),
    blame=Blame(1, -1.0, 0, 0, 0),
)


@pytest.fixture
def ledger(monkeypatch):
    subject = EagerSubject()
    known = KnownFailures(parse_known(WRONG + CRASH, "known.toml"), "mine", "cpu", BEFORE)
    session = SimpleNamespace(subject=subject, device="cpu", known=known)
    monkeypatch.setattr(report_module, "current_session", lambda: session)
    ledger = Ledger()
    ledger.ran("default", SPEC, 2)
    ledger.skipped["no <oracle> & no align"] += 3
    for used in (0.1, 0.2, 0.9):
        ledger.settle([FORM.verdict(True), ROW_RMS.verdict(True, budget_used=used)], SPEC, "replay")
    return ledger


@pytest.fixture
def violated(ledger):
    with pytest.raises(Finding):
        ledger.settle([ELEMENT.verdict(False, WORST.text(), budget_used=float("inf"), evidence=WORST)], SPEC, "again")
    return as_json(ledger, [], [])


def row(report, id):
    return next(row for row in report["properties"] if row["id"] == id)


def test_a_report_keeps_to_its_schema_and_is_json_without_nan(ledger, violated):
    for report in (violated, as_json(ledger, ["nothing"], ["stale"]), as_json(Ledger(), [], [])):
        text = json.dumps(report, allow_nan=False)
        jsonschema.validate(json.loads(text), SCHEMA)


def test_a_finding_has_its_spec_its_replay_and_its_evidence_as_data(violated):
    found = row(violated, "NUM-01")
    assert (found["verdict"], found["spec"], found["replay"]) == ("violated", repr(SPEC), "again")
    assert found["evidence"]["blame"]["expert"] == 1
    assert (found["budget_used"], found["evidence"]["got"]) == ("inf", "nan")
    assert (row(violated, "NUM-02")["budget_used_median"], row(violated, "NUM-02")["budget_used"]) == (0.2, 0.9)
    assert row(violated, "HYGIENE-01")["budget_used_median"] is None


def test_the_verdict_says_what_the_run_fails_for(ledger, violated):
    assert violated["verdict"] == "violated"
    fresh = Ledger()
    assert as_json(fresh, [], [])["verdict"] == "holds"
    assert as_json(fresh, ["x"], ["y"])["verdict"] == "nothing judged"
    assert as_json(fresh, [], ["y"])["verdict"] == "stale known failures"


def test_a_known_failure_that_passes_now_makes_the_run_stale(ledger):
    assert stale_entries(ledger) == []
    entry = report_module.current_session().known.entries[0]
    ledger.known[f"{entry.key()} met"] = 4
    assert len(stale_entries(ledger)) == 1
    assert "passes now on all 4 cases" in stale_entries(ledger)[0]


def test_junit_has_a_case_for_each_property_and_reason(violated):
    suite = ElementTree.fromstring(as_junit(violated))
    cases = suite.findall("testcase")
    assert int(suite.get("tests")) == len(cases) == 4
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure")) == 1
    assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped")) == 1
    failure = next(suite.iter("failure"))
    assert "local 1, which is lost" in str(failure.text)
    assert failure.get("type") == "NUM-01"


def test_markdown_shows_the_finding_and_folds_the_table(violated):
    text = as_markdown(violated)
    assert text.startswith("### moegate: `torch` on cpu: ❌ violated")
    assert "**NUM-01**: every element" in text
    assert "replay: again" in text.partition("<details>")[0]
    assert "| NUM-02 | 3 | 0.90 (0.20) | holds |" in text.partition("<details>")[2]
    assert "known failure, unmatched" in text


def test_the_lines_of_a_terminal_name_each_property_once(violated):
    lines = list(as_lines(violated))
    assert sum(line.startswith("NUM-01") for line in lines) == 1
    assert any("known failure, unmatched: experts (crash)" in line for line in lines)


@pytest.mark.parametrize(("name", "start"), [("a.json", "{"), ("a.xml", "<?xml"), ("a.md", "###"), ("a", "{")])
def test_a_files_name_says_its_format(violated, name, start, tmp_path):
    write_report(violated, str(tmp_path / name))
    assert (tmp_path / name).read_text().startswith(start)


def test_alarms_on_honest_subjects_are_counted_by_property_with_a_bound(ledger, violated):
    honest = as_json(Ledger(), [], [])
    text = false_alarms.as_markdown([violated, honest])
    assert "| NUM-01 | 1 | 1 | 1 |" in text
    assert "| NUM-02 | 3 | 0 | 0.63 | 0.20 to 0.20 |" in text
    assert "1 alarms in 1 cases of values" in text
    with pytest.raises(ValueError, match="expected schema 2, got 1"):
        false_alarms.as_markdown([honest | {"schema": 1}])
    with pytest.raises(ValueError, match="expected one or more"):
        false_alarms.as_markdown([])


def test_the_bound_of_no_alarm_in_ten_thousand_cases_is_three_in_ten_thousand():
    assert false_alarms.upper_bound(0, 10_000) == pytest.approx(3e-4, rel=0.01)
