"""The calibration draws what it says, and its verification draws nothing that the fit saw."""

import random

import pytest

from moegate.conformance import calibrate
from moegate.conformance.calibrate import EMULATED, KINDS, MOST_TOKENS, OTHER_SHAPES, OTHERS, PART, drawn_spec
from moegate.conformance.numerics import Numerics
from moegate.conformance.spec import SCHEMES
from moegate.conformance.strategies import POOLS


def test_the_parts_of_the_work_are_all_of_it_each_with_a_seed_of_its_own():
    parts = calibrate._parts("rounded", 2 * PART + 30, 7, "fit")
    assert [cases for _, _, cases in parts] == [PART, PART, 30]
    others = calibrate._parts("rounded", 2 * PART, 8, "fit") + calibrate._parts("rounded", 2 * PART, 7, "verify")
    assert len({own for _, own, _ in parts + others}) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_the_verification_draws_sizes_that_no_pool_has_and_declarations_that_were_not_fitted(kind):
    assert not set(OTHERS) & set(EMULATED)
    rng = random.Random(1)
    for _ in range(200):
        spec = drawn_spec(rng, kind=kind, devices=())
        size = (spec.H, spec.I, spec.block_n, spec.block_k)
        assert size in OTHER_SHAPES["none" if spec.scheme == "none" else SCHEMES[spec.scheme].weight_scale]
        for pools in POOLS.values():
            assert size not in pools.shapes_of(spec.scheme)


def test_a_quarter_of_the_cases_has_as_many_tokens_as_a_gpus():
    assert sorted(MOST_TOKENS)[-2:] == [24, 300]
    rng = random.Random(1)
    assert max(drawn_spec(rng, most_tokens=300).M for _ in range(60)) > 150


def test_what_exceeds_a_limit_is_counted_with_a_bound_and_the_median_is_shown():
    share = {"elementwise": 0.3, "row_rms": 0.2, "row_gain": 0.0, "expert_gain": 0.1}
    summary = calibrate._summary([share] * 98 + [share | {"row_gain": 1.5}] * 2)
    assert (summary["cases"], summary["exceeded"]) == (100, 2)
    assert 0.06 < summary["exceeded_95"] < 0.065
    assert (summary["largest"]["row_gain"], summary["median"]["elementwise"]) == (1.5, 0.3)


def test_an_implementation_that_rounds_more_than_it_declares_exceeds_the_limits(monkeypatch):
    """Else nothing is verified: emulations of four declarations are held to the strictest."""
    monkeypatch.setattr(calibrate, "OTHERS", (Numerics(gate_up="float32", hidden="float32", weighted="float32"),))
    honest = calibrate.emulate
    monkeypatch.setattr(calibrate, "emulate", lambda case, numerics, seed: honest(case, EMULATED[3], seed))
    worst = calibrate._unseen(("rounded", "a seed", 12))["emulations"]
    assert max(max(shares.values()) for shares in worst) > 1
