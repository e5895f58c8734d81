"""What the history answers: series that are never mixed, runs side by side, and changes found since their commits."""

import json
import math
import random
from itertools import pairwise

import pytest
from history_runs import H200, commit_id, noisy, record, stored
from hypothesis import given
from hypothesis import strategies as st
from needed import need
from typer.testing import CliRunner

from moegate import exit_codes
from moegate.bench.history.answers import UnknownRunError
from moegate.bench.history.change_points import LEAST, find_changes
from moegate.bench.history.queries import History
from moegate.bench.history.store import Store
from moegate.main import app

need("ruptures")
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Store(tmp_path / "history")


def cli(store, *arguments):
    command = ["history", *(str(argument) for argument in arguments), "--store", str(store.folder), "--json", "-"]
    done = CliRunner().invoke(app, command)
    unforeseen = done.exception is not None and not isinstance(done.exception, SystemExit)
    assert not unforeseen, done.exception
    return done.exit_code, json.loads(done.stdout) if done.stdout else None, " ".join(done.stderr.split())


def test_gpu_models_routings_subjects_and_cache_states_are_never_mixed(store):
    for number in range(3):
        one = record(40e-6)
        others = [
            record(50e-6, device=H100),
            record(60e-6, routing="zipf1.2"),
            record(61e-6, routing="zipf1.2-s7"),
            record(62e-6, routing="all-to-one"),
            record(63e-6, subject="theirs"),
            record(64e-6, dtype="fp16"),
            record(65e-6, num_tokens=16),
            {**record(66e-6), "cache_state": "unproven"},
            {**record(67e-6), "method": "cuda-eager"},
        ]
        stored(store, one, *others, commit=number, time=number)
    with History(store.folder) as history:
        series = history.series()
    assert len(series) == 10
    assert sorted(round(one.points[0].seconds * 1e6) for one in series) == [40, 50, *range(60, 68)]
    for one in series:
        assert len({point.seconds for point in one.points}) == 1
        assert len(one.points) == 3


def test_failed_dirty_and_unknown_runs_are_listed_and_drawn_nowhere(store):
    good = stored(store, record(40e-6), commit=1, time=1)
    aside = [
        stored(store, record(10e-6), commit=2, time=2, exit_code=1),
        stored(store, record(11e-6), commit=3, time=3, dirty=True),
        stored(store, record(12e-6), commit=4, time=4, exit_code=None, promoted=False),
    ]
    unpromoted = stored(store, record(41e-6), commit=5, time=5, promoted=False)
    with History(store.folder) as history:
        assert [run.id for run in history.runs()] == [unpromoted, *reversed(aside), good]
        assert [[point.run for point in one.points] for one in history.series()] == [[good]]
        assert [[point.run for point in one.points] for one in history.series(promoted=False)] == [[good, unpromoted]]
        assert history.find("baseline").id == good
        assert history.find("latest").id == unpromoted


def test_a_series_has_one_point_a_commit_in_the_order_of_commits(store):
    """Commit 1 is run again after commit 2."""
    stored(store, record(40e-6), commit=1, time=1)
    stored(store, record(50e-6), commit=2, time=2)
    late = stored(store, record(44e-6), commit=1, time=1, branch="rerun")
    with History(store.folder) as history:
        (series,) = history.series()
        first, second = series.points
        assert (first.commit, second.commit) == (commit_id(1), commit_id(2))
        assert first.seconds == pytest.approx(42e-6)
        assert first.runs == 2
        assert late in {run.id for run in history.runs(commit=commit_id(1))}


def test_the_newest_runs_of_each_gpu_model_are_looked_at(store):
    for number in range(8):
        stored(store, record(40e-6), commit=number, time=number)
    old = [stored(store, record(50e-6, device=H100), commit=number, time=number) for number in range(3)]
    with History(store.folder) as history:
        found = {series.key.device: series.points for series in history.series(newest=4)}
    assert [point.commit for point in found[H200]] == [commit_id(number) for number in (4, 5, 6, 7)]
    assert [point.run for point in found[H100]] == old  # not crowded out by the other's


def test_two_runs_stand_side_by_side_and_what_only_one_has_is_named(store):
    stored(store, record(40e-6), record(50e-6, num_tokens=64), commit=1, time=1)
    stored(store, record(44e-6), record(50e-6, num_tokens=128), {**record(9e-6, num_tokens=64), "cache_state": "warm"},
           commit=2, time=2)  # fmt: skip
    code, data, said = cli(store, "compare", commit_id(1)[:8], "latest")
    assert code == exit_codes.HOLDS
    (row,) = data["rows"]
    assert row["change"] == pytest.approx(0.1)
    assert row["key"]["num_tokens"] == 8
    why = {(each["workload"].split("-M")[1].split("-")[0], each["why"]) for each in data["unmatched"]}
    assert why == {
        ("64", "cache state cold here, warm there"),
        ("64", "cache state warm here, cold there"),
        ("128", "the other run has no time of it"),
    }
    assert "+10.0%" in said
    assert "not compared: qwen3-30b-a3b" in said


def test_runs_of_two_gpu_models_have_nothing_to_compare(store):
    first = stored(store, record(40e-6), commit=1, time=1)
    second = stored(store, record(40e-6, device=H100), commit=1, time=2)
    code, data, said = cli(store, "compare", first, second)
    assert (code, data["rows"]) == (exit_codes.NOTHING_DONE, [])
    assert f"device {H200} here, {H100} there" in said
    code, _, said = cli(store, "compare", commit_id(1)[:8], second)
    assert code == exit_codes.BAD_ARGUMENTS
    assert f"ran on {H100}; {H200}: say which device" in said
    assert cli(store, "compare", commit_id(1)[:8], second, "--device", "h100")[0] == exit_codes.HOLDS


def test_a_range_shows_every_series_from_its_first_commit_to_its_last(store):
    for number, seconds in enumerate((30e-6, 40e-6, 60e-6, 44e-6, 99e-6)):
        stored(store, record(seconds), commit=number, time=number, exit_code=int(number == 2), promoted=False)
    code, data, _ = cli(store, "compare", f"{commit_id(1)[:8]}..{commit_id(3)[:8]}")
    assert code == exit_codes.HOLDS
    (row,) = data["rows"]
    assert [round(row[name] * 1e6) for name in ("first", "last", "low", "high")] == [40, 44, 40, 44]  # 60 failed
    assert row["change"] == pytest.approx(0.1)
    code, _, said = cli(store, "compare", f"{commit_id(3)[:8]}..{commit_id(1)[:8]}")
    assert (code, "expected the older run first" in said) == (exit_codes.BAD_ARGUMENTS, True)


@pytest.mark.parametrize("name", ["zzzz", "abc", "0000000", "ffff", "baseline"])
def test_a_run_that_is_not_one_is_refused_by_name(store, name):
    for number in (1, 2):
        stored(store, record(40e-6), commit=number, time=number, promoted=False)
    code, _, said = cli(store, "compare", name)
    assert code == exit_codes.BAD_ARGUMENTS
    assert name in said


def test_a_store_that_is_not_there_is_a_bad_argument_and_an_empty_answer_is_nothing_done(store):
    code, _, said = cli(store, "list")
    assert (code, f"--store: expected a folder, got {store.folder}" in said) == (exit_codes.BAD_ARGUMENTS, True)
    stored(store, record(40e-6))
    assert cli(store, "list", "--device", "B200")[0] == exit_codes.NOTHING_DONE
    assert cli(store, "changes")[0] == exit_codes.NOTHING_DONE
    next(store.folder.rglob("promotions/*.json")).unlink()
    with History(store.folder) as history, pytest.raises(UnknownRunError, match="no promoted run"):
        history.find("baseline")


def test_changes_are_found_per_gpu_model_and_routing_with_what_else_changed(store):
    """The driver changes on the H100 with the step of its uniform series alone; zipf gets faster on the H200."""
    for number in range(24):
        late = number >= 12
        stored(
            store,
            record(noisy(40e-6, number)),
            record(noisy(50e-6 * (0.95 if late else 1), 100 + number), routing="zipf1.2"),
            commit=number,
            time=number,
        )
        driver = "590.2" if late else "580.1"
        slow = record(noisy(60e-6 * (1.04 if late else 1), 200 + number), device=H100, driver=driver)
        data = {"commit": number, "time": 100 + number}
        id = stored(store, slow, **data)
        assert id
    code, data, said = cli(store, "changes")
    assert (code, data["series"], data["searched"]) == (exit_codes.HOLDS, 3, 3)
    found = {(row["key"]["device"], row["key"]["routing"]): row for row in data["changes"]}
    assert set(found) == {(H100, "uniform-s0"), (H200, "zipf1.2-s0")}
    slower = found[H100, "uniform-s0"]
    assert (slower["last_commit"], slower["first_commit"]) == (commit_id(11), commit_id(12))
    assert slower["change"] == pytest.approx(0.04, abs=0.01)
    assert slower["also_changed"] == ["driver 580.1 -> 590.2"]
    assert found[H200, "zipf1.2-s0"]["change"] == pytest.approx(-0.05, abs=0.01)
    assert "driver 580.1 -> 590.2" in said
    assert cli(store, "changes", "--fail-recent", 11)[0] == exit_codes.HOLDS
    assert cli(store, "changes", "--fail-recent", 12)[0] == exit_codes.FINDING
    assert cli(store, "changes", "--fail-recent", 12, "--device", "H200")[0] == exit_codes.HOLDS  # faster is no finding


def noise(kind, rng, length):
    """Log-times around 0, with a spread of 0.5 %."""
    values = [rng.gauss(0, 0.005) for _ in range(length)]
    if kind == "outliers":
        return [value + (rng.expovariate(20) if rng.random() < 0.05 else 0) for value in values]
    if kind == "drift":
        return [value + 0.005 * i / length for i, value in enumerate(values)]
    if kind == "bimodal":
        return [value + 0.03 * (rng.random() < 0.3) for value in values]
    return values


@pytest.mark.parametrize(
    ("kind", "most_alarms", "least_found"),
    [("normal", 0.01, 0.98), ("outliers", 0.01, 0.95), ("drift", 0.02, 0.98), ("bimodal", 0.03, 0.70)],
)
def test_quiet_series_stay_quiet_and_a_step_of_3_percent_is_found(kind, most_alarms, least_found):
    """Over 200 series of 60 commits; the limits leave room for the luck of other draws, measured with other seeds."""
    rng = random.Random(0)
    alarms, found = 0, 0
    for _ in range(200):
        quiet = noise(kind, rng, 60)
        at = rng.randrange(8, 52)
        stepped = [value + 0.03 * (i >= at) for i, value in enumerate(quiet)]
        alarms += bool(find_changes([math.exp(value) for value in quiet]))
        found += any(abs(change.index - at) <= 2 for change in find_changes([math.exp(value) for value in stepped]))
    print(f"\n{kind}: {alarms} of 200 quiet series changed, {found} of 200 steps found")
    assert alarms <= most_alarms * 200
    assert found >= least_found * 200


def test_the_tests_of_a_break_take_away_most_false_alarms_of_short_series():
    """Of ten commits under two clocks, which is where the search alone errs most often."""
    rng = random.Random(0)
    series = [[math.exp(value) for value in noise("bimodal", rng, 10)] for _ in range(400)]
    alone, confirmed = (sum(bool(find_changes(one, max_p=p)) for one in series) for p in (1 - 1e-9, 0.001))
    print(f"\n{alone} of 400 flagged by the search alone, {confirmed} once confirmed")
    assert confirmed <= 0.02 * 400
    assert alone >= 2 * confirmed


def test_a_lone_outlier_and_two_slow_commits_are_no_change_and_three_are():
    quiet = [40e-6 * (1 + 0.001 * (i % 3)) for i in range(30)]
    for slow, count in ((1, 0), (2, 0), (LEAST, 1)):
        times = [*quiet, *[44e-6] * slow]
        assert len(find_changes(times)) == count, slow


@given(
    st.lists(st.floats(1e-7, 1.0), max_size=40),
    st.floats(0.25, 4.0).map(lambda x: 2.0 ** round(math.log2(x))),
)
def test_changes_are_in_order_large_enough_and_do_not_depend_on_the_unit(seconds, unit):
    found = find_changes(seconds)
    edges = [0, *(change.index for change in found), len(seconds)]
    assert all(right - left >= LEAST for left, right in pairwise(edges)) or not found
    assert all(change.p_value <= 0.001 and abs(change.change) >= 0.01 for change in found)
    scaled = find_changes([value * unit for value in seconds])
    assert [change.index for change in scaled] == [change.index for change in found]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([1.0, 0.0],), "seconds"),
        (([math.nan],), "seconds"),
        (([1.0], 2.0), "max_p"),
        (([1.0], 0.1, -1.0), "min_change"),
    ],
)
def test_bad_series_and_limits_are_refused_by_name(arguments, named):
    options = dict(zip(("max_p", "min_change"), arguments[1:], strict=False))
    with pytest.raises(ValueError, match=named):
        find_changes(arguments[0], **options)
