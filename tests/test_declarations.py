"""The declared numerics: kept in a file, each loose step with its reason, and none looser than what really happens."""

import json
import random
from dataclasses import asdict, replace
from importlib.resources import files

import pytest

from moegate.conformance.calibrate import drawn_spec
from moegate.conformance.calibration import KINDS, limits
from moegate.conformance.cases import build_experts
from moegate.conformance.emulation import emulate
from moegate.conformance.loading import load_subject
from moegate.conformance.numerics import Numerics
from moegate.conformance.properties.num import budget_of, judge_values, reference_of
from moegate.conformance.spec import ExpertsSpec
from moegate.conformance.statistics import statistics

DECLARED = json.loads(files("moegate.conformance").joinpath("declarations.json").read_text())
ROUNDING_POINTS = (
    "gate_up",
    "gate",
    "hidden",
    "expert_output",
    "weighted",
    "combine",
    "routing_weight",
    "shrunk",
    "dequantized_weight",
)


@pytest.mark.parametrize("name", DECLARED)
def test_a_subject_is_judged_by_the_numerics_that_its_file_declares(name):
    assert asdict(load_subject(name).numerics) == DECLARED[name]["numerics"]


@pytest.mark.parametrize("name", DECLARED)
def test_every_point_that_is_looser_than_float32_has_a_written_reason(name):
    declared = DECLARED[name]["numerics"]
    loose = {point for point in ROUNDING_POINTS if declared[point] == "storage"}
    loose |= {"accumulator"} if declared["accumulator"] != "float32" else set()
    assert set(DECLARED[name]["reasons"]) == loose


def test_how_ranks_add_their_parts_of_a_sum_is_declared_with_a_reason_where_it_is_loose():
    declared = DECLARED["moegate"]
    assert dict(load_subject("moegate").partial_sums) == declared["partial_sums"]
    loose = {exchange for exchange, at in declared["partial_sums"].items() if at == "storage"}
    assert set(declared["partial_sums_reasons"]) == loose


def _violations(numerics, claimed, *, cases=24):
    """How many honest emulations of `numerics` violate a NUM property under the `claimed` declaration."""
    count = 0
    for seed in range(cases):
        spec = ExpertsSpec(M=16, H=64, I=48, E=4, top_k=2, dtype=("bfloat16", "float16")[seed % 2], seed=seed)
        case = build_experts(spec)
        trace = reference_of(case)
        verdicts = judge_values(case, emulate(case, numerics, seed), trace, budget_of(case, trace, claimed))
        count += any(not verdict.holds for verdict in verdicts)
    return count


@pytest.mark.parametrize("name", DECLARED)
def test_an_honest_emulation_of_a_declaration_violates_nothing(name):
    numerics = Numerics(**DECLARED[name]["numerics"])
    assert _violations(numerics, numerics) == 0


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_emulation_of_any_scheme_and_activation_violates_nothing(name, kind):
    numerics, rng = Numerics(**DECLARED[name]["numerics"]), random.Random(f"{name} {kind}")
    for seed in range(60):
        case = build_experts(drawn_spec(rng, kind=kind, devices=("cpu",)))
        trace = reference_of(case)
        verdicts = judge_values(case, emulate(case, numerics, seed), trace, budget_of(case, trace, numerics))
        assert all(verdict.holds for verdict in verdicts), [v.detail for v in verdicts if not v.holds]


ONE_SIGNED = {
    "a large gate, of which silu's rounding keeps all": ExpertsSpec(
        M=80, H=256, I=128, E=1, top_k=1, dtype="float16", values="large", activation="silu_no_mul"
    ),
    "biases beyond the grid, on rows of zeros": ExpertsSpec(
        M=21, H=320, I=464, E=8, top_k=1, values="zero_rows", activation="swigluoai", bias="both_float32"
    ),
}


@pytest.mark.parametrize("why", ONE_SIGNED)
def test_roundings_that_all_go_one_way_use_the_gains_budget_no_more_than_others(why):
    """They add up along a row and over an expert's rows: in quadrature alone they took all of it, at the median."""
    numerics = replace(load_subject("moegate").numerics, weighted="float32", combine="float32")
    used = {"row": [], "expert": []}
    for seed in range(9):
        case = build_experts(replace(ONE_SIGNED[why], seed=seed))
        trace = reference_of(case)
        measured = statistics(
            emulate(case, numerics, seed), trace, budget_of(case, trace, numerics), case.operands().w2
        )
        used["row"].append(float(measured.row_gain.nan_to_num(0.0).max()) / limits().row_gain)
        used["expert"].append(float(measured.expert_gain.nan_to_num(0.0).max()) / limits().expert_gain)
    assert max(sorted(gains)[4] for gains in used.values()) < 0.5


def test_the_budget_of_a_declaration_with_every_rounding_promised_away_is_exceeded():
    numerics = load_subject("moegate").numerics
    promised = replace(numerics, gate_up="float32", hidden="float32", weighted="float32")
    assert _violations(numerics, promised) == 24


@pytest.mark.parametrize("step", ["gate_up", "hidden", "weighted"])
def test_one_step_tighter_uses_more_of_the_budget_on_every_case(step):
    """A single rounding of several hides within lambda; its share of the budget does not."""
    numerics = load_subject("moegate").numerics
    tighter = numerics.tightened(step)
    assert _used(numerics, tighter) > 1.1 * _used(numerics, numerics)


def _used(numerics, claimed):
    """Mean of a row's error over its budget without chance, on emulations of `numerics` under the `claimed` one."""
    total = 0.0
    for seed in range(8):
        case = build_experts(ExpertsSpec(M=16, H=64, I=48, E=4, top_k=2, seed=seed))
        trace = reference_of(case)
        budget, error = budget_of(case, trace, claimed), emulate(case, numerics, seed).double() - trace.output
        total += float((error.norm(dim=1) / (budget.sigma**2 + budget.last**2).sum(dim=1).sqrt()).mean())
    return total / 8


def test_the_limits_are_those_of_a_calibration_that_allows_under_one_false_alarm_in_ten_thousand_cases():
    calibrated = json.loads(files("moegate.conformance").joinpath("calibration.json").read_text())
    assert calibrated["per_case"] * 10_000 <= 0.01
    for kind in KINDS:
        largest_seen = calibrated[kind]["largest_seen"]
        for name, limit in asdict(limits(kind == "quantized")).items():
            assert largest_seen[name] < limit < 3 * largest_seen[name], (kind, name)
