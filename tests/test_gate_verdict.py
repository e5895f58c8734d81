"""The gate's statistics, on simulated noise of which the truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moegate.bench.gate.record import Verdict
from moegate.bench.gate.verdict import (
    Evidence,
    Rule,
    effect_error,
    is_open,
    judge,
    pair_effect,
    refused_threshold,
    spread_of_table,
    table_can_see,
)

FIRST, AGAIN, WORKLOADS = 5, 3, 40
FLAGGED = (Verdict.SLOWER, Verdict.FASTER)
CALLED = {Verdict.SLOWER: Verdict.FASTER, Verdict.FASTER: Verdict.SLOWER}


def two_looks(effects, rule=None, clocks=None):
    """The verdicts of a run that measures what is open once more: `effects` is `[workloads, FIRST + AGAIN]`."""
    rule = rule or Rule()

    def evidence(row, pairs):
        return Evidence(tuple(effects[row, :pairs]), FIRST, () if clocks is None else tuple(clocks[row, :pairs]))

    table = {row: evidence(row, FIRST) for row in range(len(effects))}
    first = judge(table, rule)
    left = [row for row in table if is_open(first[row], rule)]
    return judge(table | {row: evidence(row, FIRST + AGAIN) for row in left}, rule)


def noise(kind, rng, workloads=WORKLOADS, spread=0.003):
    """`[workloads, FIRST + AGAIN]` effects of pairs between equal sides."""
    shape = (workloads, FIRST + AGAIN)
    scale = spread * np.exp(rng.normal(0, 0.5, (workloads, 1)))
    match kind:
        case "even":
            return rng.normal(size=shape) * scale
        case "heavy":
            return rng.standard_t(3, size=shape) * scale / math.sqrt(3)
        case "outliers":
            return rng.normal(size=shape) * scale + (rng.random(shape) < 0.03) * rng.choice([-0.1, 0.1], shape)
        case "bimodal":
            # Processes that find one of two states, each side for itself, as memory placement does.
            return rng.normal(size=shape) * scale / 3 + 0.004 * (rng.integers(0, 2, shape) - rng.integers(0, 2, shape))
        case "mixed":
            # As on a GPU: most layers repeat within 0.1 %, and those that meet the power limit do not.
            scale = np.where(np.arange(workloads) % 5 == 0, 2 * spread, spread / 3)[:, None]
            return rng.normal(size=shape) * scale
        case "shared":
            # A pair of processes that is off as a whole: all workloads with it.
            return rng.normal(size=shape) * scale + rng.normal(size=(1, shape[1])) * spread
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["even", "heavy", "outliers", "bimodal", "mixed", "shared"])
def test_equal_sides_are_not_flagged_whatever_the_noise(kind):
    rng = np.random.default_rng(17)
    tables = [two_looks(noise(kind, rng)) for _ in range(15)]
    alarms = sum(any(each.verdict in FLAGGED for each in table.values()) for table in tables)
    assert alarms == 0
    unclear = sum(each.verdict is Verdict.UNCLEAR for table in tables for each in table.values())
    assert unclear <= 0.02 * 15 * WORKLOADS


@pytest.mark.parametrize("kind", ["even", "heavy", "bimodal", "shared"])
def test_three_percent_is_flagged_whatever_the_noise(kind):
    rng = np.random.default_rng(18)
    found, wrong = 0, 0
    for _ in range(8):
        effects = noise(kind, rng, spread=0.002)
        effects[:5] += math.log1p(0.03)
        effects[5:10] -= math.log1p(0.03)
        verdicts = [each.verdict for each in two_looks(effects).values()]
        found += verdicts[:5].count(Verdict.SLOWER) + verdicts[5:10].count(Verdict.FASTER)
        wrong += sum(verdict in FLAGGED for verdict in verdicts[10:])
    assert found >= 0.95 * 8 * 10
    assert wrong == 0


def test_a_slow_down_that_the_spread_of_pairs_hides_at_first_is_measured_again():
    rng = np.random.default_rng(19)
    found, wrong, tables = 0, 0, 40
    for _ in range(tables):
        effects = noise("mixed", rng, spread=0.004)
        effects[0] += math.log1p(0.03)  # one whose pairs spread by 0.8 %, where most others' do by 0.13 %
        verdicts = [each.verdict for each in two_looks(effects).values()]
        found += verdicts[0] is Verdict.SLOWER
        wrong += sum(verdict in FLAGGED for verdict in verdicts[1:])
    assert found >= 0.95 * tables
    assert wrong == 0


def test_same_names_the_least_change_that_is_excluded():
    rng = np.random.default_rng(20)
    table = {row: Evidence(tuple(each), FIRST) for row, each in enumerate(noise("mixed", rng))}
    judged = judge(table | {0: Evidence((0.016, -0.004, 0.011, 0.002, 0.005), FIRST)}, Rule())
    quiet, noisy = judged[1], judged[0]
    assert (quiet.verdict, quiet.threshold) == (Verdict.SAME, Rule().threshold)
    assert not is_open(quiet, Rule())
    assert noisy.verdict is Verdict.SAME
    assert is_open(noisy, Rule())
    assert noisy.threshold > Rule().threshold


def test_drift_within_a_process_meets_both_sides_alike():
    rng = np.random.default_rng(3)
    rounds = 8
    # 20 % slower from the first round to the last, and both sides take their turns in each.
    drift = np.linspace(1, 1.2, 2 * rounds).reshape(rounds, 2)
    effects = []
    for _ in range(40):
        base_first = rng.permutation([True, False] * (rounds // 2))
        base, head = np.where(base_first, drift.T, drift.T[::-1])
        effects.append(pair_effect(list(1e-3 * base), list(1.03e-3 * head)))
    # One after the other, the second of the two would look 10 % slower.
    assert np.mean(effects) == pytest.approx(math.log(1.03), abs=0.003)


def test_one_disturbed_round_changes_no_pair():
    calm = pair_effect([1.0] * 7, [1.02] * 7)
    disturbed = pair_effect([1.0] * 7, [1.02] * 6 + [5.0])
    assert disturbed == pytest.approx(calm)


def test_the_rounds_of_a_pair_say_how_well_its_effect_is_known():
    rng = np.random.default_rng(21)
    rounds = [np.exp(rng.normal(0, 0.01, (2, 6))) for _ in range(300)]
    said = [effect_error(list(base), list(head)) for base, head in rounds]
    really = np.std([pair_effect(list(base), list(head)) for base, head in rounds])
    assert np.mean(said) == pytest.approx(really, rel=0.2)
    assert effect_error([1.0] * 6, [1.02] * 5 + [5.0]) == 0  # one disturbed round in six


@given(
    effects=st.lists(st.lists(st.floats(-0.2, 0.2), min_size=4, max_size=4), min_size=1, max_size=6),
    threshold=st.sampled_from([0.005, 0.01, 0.05]),
)
@settings(deadline=None, max_examples=40, derandomize=True, database=None)
def test_exchanging_the_sides_mirrors_the_verdicts(effects, threshold):
    rule = Rule(threshold=threshold)
    ours = judge({i: Evidence(tuple(row), 2) for i, row in enumerate(effects)}, rule)
    theirs = judge({i: Evidence(tuple(-e for e in row), 2) for i, row in enumerate(effects)}, rule)
    for name, each in ours.items():
        other = theirs[name]
        assert other.verdict is CALLED.get(each.verdict, each.verdict)
        assert math.log1p(other.change) == pytest.approx(-math.log1p(each.change), abs=1e-12)
        assert math.log1p(other.low) == pytest.approx(-math.log1p(each.high), abs=1e-9)


@given(
    effects=st.lists(st.lists(st.floats(-0.2, 0.2), min_size=3, max_size=6), min_size=1, max_size=6),
    looks=st.integers(1, 3),
)
@settings(deadline=None, max_examples=40, derandomize=True, database=None)
def test_a_verdict_says_what_its_numbers_say(effects, looks):
    rule = Rule(looks=looks)
    table = {i: Evidence(tuple(row), 2) for i, row in enumerate(effects)}
    for each in judge(table, rule).values():
        assert each.low <= each.change <= each.high
        assert each.can_see > 0
        # The interval excludes zero exactly where the table's control calls the change a discovery.
        assert (each.adjusted <= rule.level / looks) == (each.low > 0 or each.high < 0)
        if each.verdict is Verdict.SLOWER:
            assert each.low > 0
            assert each.change >= rule.threshold * (1 - 1e-9)
        if each.verdict is Verdict.SAME:
            assert abs(each.change) < each.threshold


def test_a_few_effects_lend_each_other_their_spread():
    rng = np.random.default_rng(5)
    alike = spread_of_table([float(rng.normal(size=5).var(ddof=1)) for _ in range(200)], [4] * 200)
    assert 0.5 < alike.variance < 2
    assert alike.dof > 10
    scales = np.exp(rng.normal(0, 2, 200))
    unlike = spread_of_table([float((rng.normal(size=5) * s).var(ddof=1)) for s in scales], [4] * 200)
    assert unlike.dof < 2


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(11)
    rule = Rule(level=0.2, looks=1)
    covered = tables = 0
    for _ in range(60):
        effects = rng.normal(size=(20, 4)) * 0.01
        table = judge({i: Evidence(tuple(row), 4) for i, row in enumerate(effects)}, rule)
        covered += all(each.low <= 0 <= each.high for each in table.values())
        tables += 1
    # No change anywhere: a false discovery in at most a fifth of the tables, within binomial chance.
    assert covered >= stats.binom.ppf(0.001, tables, 0.8)


def test_what_can_be_seen_is_seen_in_four_of_five_runs():
    rng = np.random.default_rng(7)
    sees, found, spread = [], 0, 0.01
    for _ in range(40):
        table = judge({i: Evidence(tuple(rng.normal(size=6) * spread), 6) for i in range(10)}, Rule(looks=1))
        sees.append(table_can_see(table))
    effect = math.log1p(float(np.median(sees)))
    for _ in range(100):
        effects = rng.normal(size=(10, 6)) * spread
        effects[0] += effect
        table = judge({i: Evidence(tuple(row), 6) for i, row in enumerate(effects)}, Rule(looks=1))
        found += table[0].adjusted <= Rule().level
    assert stats.binom.ppf(0.005, 100, 0.8) <= found <= stats.binom.ppf(0.995, 100, 0.8)


SLOW = (0.03, 0.031, 0.029, 0.03, 0.0305)


def test_a_suspect_counts_only_once_it_was_measured_again():
    once = judge({"a": Evidence(SLOW, 5)}, Rule())["a"]
    assert once.verdict is Verdict.UNCLEAR
    assert once.suspect
    again = judge({"a": Evidence((*SLOW, 0.029, 0.031), 5)}, Rule())["a"]
    assert again.verdict is Verdict.SLOWER
    gone = judge({"a": Evidence((*SLOW, *SLOW, 0.0, 0.001), 10)}, Rule())["a"]
    assert gone.verdict is Verdict.UNCLEAR
    assert "when measured again" in gone.why


def test_what_a_slower_clock_explains_is_not_held_against_the_head():
    effects, again = (*SLOW, 0.03, 0.03), 5
    slow_clock = judge({"a": Evidence(effects, again, (-0.03,) * 7)}, Rule())["a"]
    assert slow_clock.verdict is Verdict.UNCLEAR
    assert "SM clock" in slow_clock.why
    assert judge({"a": Evidence(effects, again, (0.0,) * 7)}, Rule())["a"].verdict is Verdict.SLOWER
    assert judge({"a": Evidence(effects, again, (0.03,) * 7)}, Rule())["a"].verdict is Verdict.SLOWER


def test_a_threshold_below_what_can_be_seen_is_refused():
    rng = np.random.default_rng(1)
    table = {str(i): Evidence(tuple(rng.normal(size=4) * 0.01), 4) for i in range(6)}
    strict = dict.fromkeys(table, Rule(threshold=0.01, strict=True))
    judged = judge(table, strict)
    assert "below what can be seen here" in str(refused_threshold(judged, strict))
    assert all(each.verdict is not Verdict.SAME or each.can_see < 0.05 for each in judged.values())
    wide = {name: replace(rule, threshold=0.2) for name, rule in strict.items()}
    assert refused_threshold(judge(table, wide), wide) is None
    default = dict.fromkeys(table, Rule())
    assert refused_threshold(judge(table, default), default) is None


def test_a_change_smaller_than_the_threshold_is_same_though_it_is_real():
    small = tuple(0.004 + 1e-4 * i for i in range(5))
    judged = judge({"a": Evidence(small, 5)}, Rule(threshold=0.01, strict=True))["a"]
    assert judged.verdict is Verdict.SAME
    assert "though 0.4% slower" in judged.why


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Evidence((0.1,), 1), "effects: expected those of at least 2 pairs, got 1"),
        (lambda: Evidence((0.1, math.nan), 2), "effects: expected finite numbers"),
        (lambda: Evidence((0.1, 0.2), 3), "first_look: expected 2 to 2 pairs, got 3"),
        (lambda: Evidence((0.1, 0.2), 2, (0.1,)), "clock_effects: expected one a pair"),
        (lambda: Rule(threshold=0), "threshold: expected a fraction above 0"),
        (lambda: Rule(level=1), "level: expected more than 0 and less than 1, got 1"),
        (lambda: Rule(looks=0), "looks: expected at least 1, got 0"),
        (lambda: pair_effect([], []), "rounds: expected as many of both and at least one"),
        (lambda: judge({"a": Evidence((0.1, 0.2), 2)}, {}), "rules: expected one for each workload, got none for a"),
    ],
)
def test_bad_evidence_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
