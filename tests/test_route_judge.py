"""What the ROUTE properties accept and reject, on answers made by hand: legal ones within budget, and no others."""

from dataclasses import replace

import pytest
import torch

from moegate.conformance.arena import Arena
from moegate.conformance.calibration import limits
from moegate.conformance.cases import RoutingCase, build_routing
from moegate.conformance.properties.route import judge_routing, truth_of
from moegate.conformance.routing_budget import score_error
from moegate.conformance.spec import RoutingSpec
from moegate.reference.routing import logits_of, scores_of, weights_at

# A difference that float32 scores near 1 cannot be asked to see.
TINY = 2.0**-26


def case_of(logits, top_k, **method):
    bias = method.pop("bias", None)
    if bias is not None:
        method["e_score_correction_bias"] = torch.tensor(bias)
    return RoutingCase(torch.tensor([logits], dtype=torch.float64), top_k, True, Arena(), **method)


def violated(case, ids):
    """The properties that an answer violates whose weights are right at its ids."""
    truth = truth_of(case)
    weights = weights_at(truth.scores, torch.tensor([ids]), renormalize=True)
    verdicts = judge_routing(case, weights.float(), torch.tensor([ids], dtype=torch.int32))
    return {verdict.property.id for verdict in verdicts if not verdict.holds}


SATURATED = [20.0, 60.0, 20.0, 40.0]


def test_scores_that_saturate_may_come_in_any_order_but_bit_equal_ones_may_not():
    case = case_of(SATURATED, 3, scoring_func="sigmoid")
    for ids in ([1, 3, 0], [0, 1, 2], [3, 0, 2], [0, 1, 3]):
        assert violated(case, ids) == set(), ids
    for ids in ([1, 3, 2], [2, 0, 1], [2, 1, 3]):
        assert violated(case, ids) == {"ROUTE-05"}, ids


def test_softmax_alone_ranks_by_logits_where_its_scores_underflow():
    case = case_of([0.0, -900.0, -800.0], 2)
    assert violated(case, [0, 2]) == set()
    assert violated(case, [0, 1]) == {"ROUTE-04"}


def test_a_score_that_is_clearly_smaller_may_not_be_chosen_nor_come_first():
    case = case_of([0.0, 1.0, 2.0, -1.0], 2, scoring_func="sigmoid")
    assert violated(case, [2, 1]) == set()
    assert violated(case, [2, 0]) == {"ROUTE-04"}
    assert violated(case, [1, 2]) == {"ROUTE-05"}


def test_the_bias_ranks_and_ties_of_score_and_bias_go_to_the_lower_id():
    case = case_of([0.5, 0.5, 0.5, 2.0], 2, scoring_func="sigmoid", bias=[0.0, 1.0, 1.0, 0.0])
    assert violated(case, [1, 2]) == set()
    assert violated(case, [2, 1]) == {"ROUTE-05"}
    assert violated(case, [1, 3]) == {"ROUTE-04"}


GROUPED = {"scoring_func": "sigmoid", "num_expert_group": 3, "topk_group": 1}


def test_experts_of_two_groups_are_no_answer_where_one_is_kept():
    case = case_of([3.0, -3.0, 0.5, 0.4, 2.0, -2.0], 2, group_ranking="max", **GROUPED)
    assert violated(case, [0, 1]) == set()
    assert violated(case, [0, 4]) == {"ROUTE-10"}  # the best two of all
    assert violated(case, [2, 3]) == {"ROUTE-10"}  # the best sum of two


def test_the_sum_of_two_and_the_maximum_keep_different_groups():
    logits = [3.0, -3.0, 1.5, 1.25, 2.0, -2.0]
    assert violated(case_of(logits, 2, group_ranking="top2_sum", **GROUPED), [2, 3]) == set()
    assert violated(case_of(logits, 2, group_ranking="top2_sum", **GROUPED), [0, 1]) == {"ROUTE-10"}
    assert violated(case_of(logits, 2, group_ranking="max", **GROUPED), [0, 1]) == set()


def test_of_groups_within_budget_either_may_be_kept_but_not_half_of_each():
    case = case_of([20.0, 30.0, 25.0, 21.0, 0.0, 0.0], 2, group_ranking="top2_sum", **GROUPED)
    assert violated(case, [1, 0]) == violated(case, [2, 3]) == set()
    assert violated(case, [0, 2]) == {"ROUTE-10"}
    assert violated(case, [4, 5]) == {"ROUTE-10"}


def test_of_bit_equal_groups_the_lower_is_kept_in_whatever_order_their_experts_are():
    case = case_of([1.0, 2.0, 2.0, 1.0, 0.0, 0.0], 2, group_ranking="top2_sum", **GROUPED)
    assert violated(case, [1, 0]) == set()
    assert violated(case, [2, 3]) == {"ROUTE-05"}


def test_a_better_expert_of_a_kept_group_may_not_be_passed_over():
    case = case_of([3.0, 1.0, 2.9, 0.0, -3.0, -3.0], 2, group_ranking="max", **GROUPED | {"topk_group": 2})
    assert violated(case, [0, 2]) == set()
    assert violated(case, [0, 1]) == {"ROUTE-04"}


def test_what_is_minus_infinity_comes_last_whatever_its_bias():
    case = case_of([-torch.inf, 0.0, -4.0], 2, scoring_func="sigmoid", bias=[9.0, 0.0, 0.0])
    assert violated(case, [1, 2]) == set()
    assert violated(case, [0, 1]) == {"ROUTE-04"}


def test_a_padding_token_must_say_that_it_is_one_and_a_real_one_must_not():
    case = build_routing(RoutingSpec(M=3, E=8, top_k=2, padding="some", scoring="sigmoid"))
    ids = torch.tensor([[0, 1], [0, 1], [-1, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]])
    judged = {v.property.id: v.holds for v in judge_routing(case, weights, ids)}
    assert judged["ROUTE-09"]
    for bad_weights, bad_ids in ((weights + 0.25, ids), (weights, ids.abs()), (weights, ids.flip(0))):
        judged = {v.property.id: v.holds for v in judge_routing(case, bad_weights, bad_ids)}
        assert not judged["ROUTE-09"]


def test_the_answer_of_a_custom_function_may_be_scaled_and_nothing_else():
    case = build_routing(RoutingSpec(M=4, E=8, top_k=3, scoring="custom", scaling="above_one"))
    assert case.custom_answer is not None
    weights, ids = case.custom_answer
    ids = ids.clone()
    assert all(v.holds for v in judge_routing(case, 2.5 * weights, ids))
    for bad in (weights, 6.25 * weights, 2.5 * weights / weights.sum(dim=1, keepdim=True), 2.5 * weights.flip(0)):
        assert not judge_routing(case, bad, ids)[-1].holds
    assert not judge_routing(case, 2.5 * weights, ids.flip(1))[-1].holds


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_torch_s_own_float32_scores_are_within_budget_and_use_it(scoring):
    logits = torch.linspace(-60, 60, 2000).view(40, 50)
    functions = {
        "softmax": lambda v: v.softmax(dim=1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda v: torch.nn.functional.softplus(v).sqrt(),
    }
    exact = scores_of(logits_of(logits), scoring)
    used = (functions[scoring](logits).double() - exact).abs() / score_error(logits_of(logits), exact, scoring)
    assert 0.02 < float(used.max()) < limits().elementwise


def test_a_softplus_that_loses_small_numbers_is_beyond_the_budget():
    logits = torch.linspace(-14, -8, 100)[None]
    exact = scores_of(logits_of(logits), "sqrtsoftplus")
    careless = torch.log(1 + torch.exp(logits)).sqrt().double()
    used = (careless - exact).abs() / score_error(logits_of(logits), exact, "sqrtsoftplus")
    assert float(used.max()) > 10 * limits().elementwise


def test_a_rank_within_the_budget_of_another_may_be_either():
    case = case_of([0.0, 0.0, -5.0], 1, scoring_func="sigmoid", bias=[0.0, 0.5, 0.0])
    near = replace(case, e_score_correction_bias=torch.tensor([0.5 - TINY, 0.5, 0.0], dtype=torch.float64))
    assert violated(case, [0]) == {"ROUTE-04"}
    assert violated(near, [0]) == violated(near, [1]) == set()
