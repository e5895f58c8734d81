"""`moegate report`: what it refuses, and that what it shows is what was handed in."""

import json
import re

import pytest
from history_runs import record, stored
from needed import need
from report_inputs import HOSTILE, check_report, faults_report, fill_history, gate_record
from typer.testing import CliRunner

from moegate import exit_codes
from moegate.bench.history.queries import History
from moegate.bench.history.store import Store
from moegate.bench.html_report.contents import MOST_POINTS, gather
from moegate.bench.html_report.decisions import LAYERS, PLATFORMS, decision_table
from moegate.main import app

need("jinja2", "plotly", "ruptures")
from moegate.bench.html_report.page import render  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def cli(*arguments):
    done = CliRunner().invoke(app, ["report", *(str(argument) for argument in arguments)])
    unforeseen = done.exception is not None and not isinstance(done.exception, SystemExit)
    assert not unforeseen, done.exception
    return done.exit_code, " ".join(done.output.split())


def text_of(page):
    """The page without its scripts and style."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)


def test_the_page_names_no_address_and_its_policy_allows_no_request(tmp_path):
    fill_history(tmp_path / "history")
    code, said = cli("--store", "history", "-o", "out/report.html")
    assert code == exit_codes.HOLDS
    assert "6 series, 2 changes" in said
    assert "set aside: runs/notes.txt" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!#|data:,)[^\"]*\"", text_of(page))
    (policy,) = re.findall(r"Content-Security-Policy\" content=\"([^\"]+)\"", page)
    policy = policy.replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ")
    assert len(re.findall(r"'sha256-[^']+'", policy)) == 2
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_hostile_text_is_escaped_wherever_it_comes_from(tmp_path):
    hostile = {**record(9e-6), **dict.fromkeys(("model", "subject", "routing", "workload", "dtype"), HOSTILE)}
    stored(Store(tmp_path / "history"), hostile)
    gate = gate_record(why=[HOSTILE], notes=[HOSTILE], device=HOSTILE)
    for name in ("workload", "why", "routing"):
        gate["workloads"][0][name] = HOSTILE
    faults, check = faults_report(), check_report()
    faults["faults"][0].update(id=HOSTILE, area=HOSTILE, by=[HOSTILE])
    check["properties"][0].update(id=HOSTILE, sentence=HOSTILE)
    with History(tmp_path / "history") as history:
        page = render(
            gather(history, version=HOSTILE, decisions=decision_table(), gates=[gate], checks=[check], faults=[faults])
        )
    assert "<img" not in page.replace("plotly", "")[-200_000:]
    assert "<img" not in text_of(page)
    assert "onerror=&#34;document.title" in text_of(page)
    data = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["series"][0]["model"] == HOSTILE


def test_the_decision_table_is_the_oracles(tmp_path):
    table = decision_table()
    assert set(table) == set(LAYERS)
    assert all(tuple(row) == PLATFORMS for row in table.values())
    for row in table.values():
        for cell in row.values():
            assert sum(reason["taken"] for reason in cell.reasons) == bool(cell.backend)
            assert bool(cell.backend) != bool(cell.refusal)
    assert table["bf16"]["cuda:9.0"].backend == "triton"
    assert table["bf16, batched"]["cuda:9.0"].backend == "batched_triton"
    assert table["bf16"]["cpu"].backend == "cpu"


def test_a_long_series_is_searched_whole_and_drawn_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    store = Store(tmp_path / "history")
    for number in range(MOST_POINTS + 20):
        stored(store, record(40e-6 * (1 if number < 10 else 1.1)), commit=number, time=number)
    with History(store.folder) as history:
        contents = gather(history, version="1", decisions={})
    (series,) = contents.series
    assert (len(series["points"]), series["left_out"]) == (MOST_POINTS, 20)
    assert len(contents.changes) == 1
    assert series["changes"] == []  # before what is drawn
    assert series["last_change"]["change"] == pytest.approx(0.1)
    assert "420 (last 400 drawn)" in text_of(render(contents))


def test_unpromoted_runs_are_drawn_only_where_asked(tmp_path):
    stored(Store(tmp_path / "history"), record(40e-6), promoted=False)
    assert "0 series" in cli("--store", "history")[1]
    assert "1 series" in cli("--store", "history", "--all")[1]


@pytest.mark.parametrize(
    ("option", "damage", "named"),
    [
        ("gate", lambda data: data.update(schema="moegate-gate/0"), "expected schema moegate-gate/1"),
        ("gate", lambda data: data.pop("workloads"), "got none of workloads"),
        ("check", lambda data: data.pop("properties"), "got none of properties"),
        ("faults", lambda data: data["faults"][0].pop("by"), "got none of by"),
    ],
)
def test_a_file_that_is_not_what_its_option_says_is_refused_by_name(tmp_path, option, damage, named):
    data = {"gate": gate_record, "check": check_report, "faults": faults_report}[option]()
    damage(data)
    (tmp_path / "file.json").write_text(json.dumps(data))
    code, said = cli(f"--{option}", "file.json")
    assert code == exit_codes.BAD_ARGUMENTS
    assert f"--{option}: " in said
    assert named in said
    assert not (tmp_path / "moegate-report.html").exists()


def test_nothing_to_show_is_said_and_bad_paths_are_refused(tmp_path):
    code, said = cli()
    assert (code, "nothing to show" in said) == (exit_codes.NOTHING_DONE, True)
    assert cli("--store", "nowhere")[0] == exit_codes.BAD_ARGUMENTS
    assert cli("--check", "nowhere.json")[0] == exit_codes.BAD_ARGUMENTS
    (tmp_path / "half.json").write_text('{"schema": 1')
    assert "half.json" in cli("--check", "half.json")[1]


def test_conformance_shows_known_failures_infinite_budgets_and_how_to_replay():
    page = text_of(render(gather(None, version="1", decisions={}, checks=[check_report()])))
    (row,) = re.findall(r"NUM-02</th>.*?</tr>", page, flags=re.DOTALL)
    assert "inf" in row
    assert '<strong class="warn">known</strong>' in row
    assert "known failure: NUM-02, https://example.org/1: tolerated, 3 cases" in page
    assert "moegate check --spec here" in page


def test_stored_gates_are_shown_once(tmp_path):
    Store(tmp_path / "history").add_gate(gate_record())
    (tmp_path / "gate.json").write_text(json.dumps(gate_record()))
    code, said = cli("--store", "history", "--gate", "gate.json")
    assert (code, "1 gates" in said) == (exit_codes.HOLDS, True)
