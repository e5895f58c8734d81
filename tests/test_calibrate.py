"""The calibration draws what it says, and its verification draws nothing that the fit saw."""

import random
from functools import partial

import pytest

from moegate.conformance import calibrate
from moegate.conformance.calibrate import EMULATED, KINDS, MOST_TOKENS, OTHER_SHAPES, OTHERS, PART, drawn_spec
from moegate.conformance.calibration import limits
from moegate.conformance.numerics import Numerics
from moegate.conformance.spec import SCHEMES, ExpertsSpec
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


# Honest cases that were beyond a limit before the budget knew why, each with the declaration and the emulation's seed.
ONCE_BEYOND = {
    "products of few bits with a weight next to a power of two": (
        ExpertsSpec(
            M=193, H=288, I=160, E=5, top_k=4, routing="empty_expert", weights="one_zero", expert_map="round_robin",
            values="spread", scheme="int8_w8a16_group", block_k=32, activation="swigluoai", bias="w2", seed=161624,
        ), 1, 556646705,
    ),
    "biases that the last rounding cuts alike": (
        ExpertsSpec(
            M=5, H=72, I=56, E=3, top_k=1, dtype="float16", routing="some_invalid", weights="one_zero",
            expert_map="round_robin", values="asymmetric", weight_on_input=True, scheme="fp8_tensor_static",
            bias="both_float32", seed=561980,
        ), 2, 484217564,
    ),
    "sums that are cut at each step": (
        ExpertsSpec(
            M=166, H=320, I=464, E=2, top_k=2, dtype="float16", routing="tile", weights="one_zero",
            expert_map="arbitrary", scheme="fp8_tensor_static", activation="silu_no_mul", seed=158307,
        ), 3, 833883406,
    ),
    "weights that share an offset, below the smallest normal number": (
        ExpertsSpec(
            M=23, H=80, I=48, E=5, top_k=1, dtype="float16", weights="spread", expert_map="arbitrary", values="tiny",
            weight_on_input=True, scheme="int4_group_zp", block_k=16, activation="gelu_no_mul", seed=946398,
        ), 0, 527010835,
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", ONCE_BEYOND)
def test_an_honest_case_that_was_beyond_a_limit_is_within_all_of_them(why):
    spec, declared, seed = ONCE_BEYOND[why]
    numerics = EMULATED[declared]
    worst = calibrate.worst_statistics(spec, numerics, partial(calibrate.emulate, numerics=numerics, seed=seed))
    limit = limits(SCHEMES[spec.scheme].activation_scale is not None)
    assert max(value / getattr(limit, name) for name, value in worst.items()) < 0.8
