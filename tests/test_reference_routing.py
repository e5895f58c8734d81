"""The reference's routing against scalar Python loops, and against cases that were computed by hand from the papers."""

import math
from decimal import Decimal, getcontext

import pytest
import torch

from moegate.reference.routing import route, scores_of, softmax

INF, NAN = math.inf, math.nan


def loop_scores(row, scoring):
    """One token's scores: NaN is -inf, infinite logits share a softmax, float32's largest number stands for +inf."""
    logits = [-INF if math.isnan(value) else value for value in row]
    if scoring == "softmax":
        top = max(logits)
        parts = [float(v == top) if math.isinf(top) else math.exp(v - top) for v in logits]
        return [part / sum(parts) for part in parts]
    if scoring == "sigmoid":
        return [1 / (1 + math.exp(-v)) if v > -700 else 0.0 for v in logits]
    finite = [min(v, 3.4028234663852886e38) for v in logits]
    return [math.sqrt(max(v, 0.0) + math.log1p(math.exp(-abs(v)))) for v in finite]


def loop_routing(row, top_k, renormalize, scoring="softmax", bias=None, groups=None):
    """One token's weights and ids; `groups` is (number, kept, ranking). Sorts by a key whose last part is the id."""
    scores = loop_scores(row, scoring)
    logits = [-INF if math.isnan(value) else value for value in row]
    added = bias or [0.0] * len(row)
    ranks = [-INF if v == -INF else s + b for v, s, b in zip(logits, scores, added, strict=True)]
    keys = logits if bias is None else ranks
    allowed = set(range(len(row)))
    if groups is not None:
        number, kept, ranking = groups
        size = len(row) // number
        members = [range(g * size, (g + 1) * size) for g in range(number)]
        if ranking == "max":
            values = [max(keys[e] for e in group) for group in members]
        else:
            values = [sum(sorted((ranks[e] for e in group), reverse=True)[:2]) for group in members]
        best = sorted(range(number), key=lambda g: (-values[g], g))[:kept]
        allowed = {e for g in best for e in members[g]}
    ids = sorted(allowed, key=lambda e: (-keys[e], e))[:top_k]
    total = sum(scores[e] for e in ids) + 1e-20 if renormalize else 1.0
    return [scores[e] / total for e in ids], ids


ROWS = {
    "plain": [0.5, -1.25, 2.0, 0.0, 1.5, 0.75],
    "tie_at_the_kth": [1.0, 3.0, 1.0, 1.0, 0.5, 0.25],
    "all_equal": [0.25] * 6,
    "a_nan": [0.5, NAN, 2.0, NAN, 1.5, 0.0],
    "more_nans_than_others": [NAN, 1.0, NAN, NAN, NAN, -1.0],
    "all_nan": [NAN] * 6,
    "minus_infinity": [-INF, 1.0, -INF, 0.0, 2.0, -1.0],
    "all_minus_infinity": [-INF] * 6,
    "two_plus_infinities": [INF, 1.0, INF, NAN, -INF, 0.0],
    "far_apart": [1000.0, -1000.0, 999.0, 0.0, 1000.0, -40.0],
    "all_far_below": [-90.0, -60.0, -80.0, -70.0, -100.0, -50.0],
}
BIAS = [0.25, 3.0, -2.0, 0.0, 3.0, 0.5]


@pytest.mark.parametrize("groups", [None, (3, 2, "max"), (3, 2, "top2_sum"), (2, 1, "top2_sum"), (6, 4, "max")])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["no-bias", "bias"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_routing_says_what_the_scalar_loop_says(renormalize, scoring, bias, groups):
    for top_k in (1, 2, 3) if groups else (1, 2, 6):
        number, kept, ranking = groups or (1, 1, "max")
        weights, ids = route(
            torch.tensor(list(ROWS.values())),
            top_k,
            scoring_func=scoring,
            renormalize=renormalize,
            num_expert_group=number,
            topk_group=kept,
            group_ranking=ranking,
            e_score_correction_bias=None if bias is None else torch.tensor(bias),
        )
        assert ids.dtype == torch.int32
        for token, (name, row) in enumerate(ROWS.items()):
            expected_weights, expected_ids = loop_routing(row, top_k, renormalize, scoring, bias, groups)
            assert ids[token].tolist() == expected_ids, (name, top_k)
            assert weights[token].tolist() == pytest.approx(expected_weights, rel=1e-13, abs=1e-300), (name, top_k)
        assert weights.isfinite().all()


def logit(score):
    """The logit whose sigmoid is the score."""
    return math.log(score / (1 - score))


# Three groups of two experts; sigmoid scores that are easily added up.
SCORES = [0.9, 0.1, 0.6, 0.5, 0.8, 0.15]


def routed(top_k, **method):
    weights, ids = route(torch.tensor([[logit(s) for s in SCORES]], dtype=torch.float64), top_k, **method)
    return [round(w, 12) for w in weights[0].tolist()], ids[0].tolist()


def test_deepseek_v3_keeps_the_groups_with_the_largest_sums_of_two():
    """Sums of 1.0, 1.1 and 0.95: one group kept is the second, two are the first two."""
    method = {
        "scoring_func": "sigmoid",
        "renormalize": False,
        "num_expert_group": 3,
        "group_ranking": "top2_sum",
    }
    assert routed(2, topk_group=1, **method) == ([0.6, 0.5], [2, 3])
    assert routed(3, topk_group=2, **method) == ([0.9, 0.6, 0.5], [0, 2, 3])


def test_deepseek_v2_keeps_the_groups_with_the_best_experts():
    """Maxima of 0.9, 0.6 and 0.8."""
    method = {"scoring_func": "sigmoid", "renormalize": False, "num_expert_group": 3, "group_ranking": "max"}
    assert routed(2, topk_group=1, **method) == ([0.9, 0.1], [0, 1])
    assert routed(3, topk_group=2, **method) == ([0.9, 0.8, 0.15], [0, 4, 5])


def test_the_bias_ranks_groups_and_experts_and_the_weights_are_the_scores():
    """With 0.5 on expert 1 and 0.75 on expert 3 the ranks are 0.9 0.6 | 0.6 1.25 | 0.8 0.15, sums 1.5, 1.85, 0.95."""
    weights, ids = routed(
        3,
        scoring_func="sigmoid",
        num_expert_group=3,
        topk_group=2,
        group_ranking="top2_sum",
        e_score_correction_bias=torch.tensor([0.0, 0.5, 0.0, 0.75, 0.0, 0.0]),
        routed_scaling_factor=2.5,
    )
    # Experts 1 and 2 rank 0.6 both, up to the rounding of a logit: either may be third.
    assert ids[:2] == [3, 0]
    total = 0.5 + 0.9 + SCORES[ids[2]]
    assert weights == pytest.approx([2.5 * 0.5 / total, 2.5 * 0.9 / total, 2.5 * SCORES[ids[2]] / total])


def test_groups_left_out_stay_out_though_every_rank_is_negative():
    """A mask of 0 instead of -inf would let them in."""
    bias = torch.full((6,), -8.0)
    assert routed(2, scoring_func="sigmoid", num_expert_group=3, topk_group=1, e_score_correction_bias=bias)[1] == [
        0,
        1,
    ]


def test_equal_groups_keep_the_lower_one_and_equal_experts_the_lower_id():
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0]])
    ids = route(logits, 3, num_expert_group=3, topk_group=2, group_ranking="top2_sum")[1]
    assert ids.tolist() == [[1, 2, 0]]


def test_sqrtsoftplus_is_the_root_of_the_softplus():
    """sqrt(ln 2) at 0, sqrt(x) far above, exp(x / 2) far below."""
    scores = scores_of(torch.tensor([[0.0, 400.0, -80.0, -INF]], dtype=torch.float64), "sqrtsoftplus")[0].tolist()
    assert scores == pytest.approx([math.log(2) ** 0.5, 20.0, math.exp(-40.0), 0.0], rel=1e-14)


def test_where_every_score_is_0_the_weights_are_0_and_no_number_is_missing():
    weights, ids = route(torch.full((1, 4), -INF), 2, scoring_func="sigmoid")
    assert (weights.tolist(), ids.tolist()) == ([[0.0, 0.0]], [[0, 1]])


def test_the_scaling_factor_is_applied_once_renormalised_or_not():
    logits = torch.tensor([[0.5, 1.5, -1.0]])
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus"):
        weights, _ = route(logits, 2, scoring_func=scoring, routed_scaling_factor=2.5)
        assert float(weights.sum()) == pytest.approx(2.5, rel=1e-14)
        plain = route(logits, 2, scoring_func=scoring, renormalize=False)[0]
        scaled = route(logits, 2, scoring_func=scoring, renormalize=False, routed_scaling_factor=2.5)[0]
        assert scaled.tolist()[0] == pytest.approx([2.5 * w for w in plain.tolist()[0]], rel=1e-15)


def test_padding_tokens_choose_nobody():
    count = torch.tensor([1], dtype=torch.int32)
    weights, ids = route(torch.tensor([[1.0, 2.0], [NAN, NAN]]), 1, num_tokens_non_padded=count)
    assert (weights.tolist(), ids.tolist()) == ([[1.0], [0.0]], [[1], [-1]])


def test_a_custom_function_decides_and_scaling_and_padding_are_still_ours():
    def first(logits, top_k, renormalize):
        assert (tuple(logits.shape), top_k, renormalize) == ((2, 3), 1, False)
        return torch.full((2, 1), 0.5), torch.tensor([[2], [1]])

    count = torch.tensor([1], dtype=torch.int32)
    weights, ids = route(
        torch.zeros(2, 3),
        1,
        renormalize=False,
        routed_scaling_factor=3.0,
        num_tokens_non_padded=count,
        custom_routing_function=first,
    )
    assert (weights.tolist(), ids.tolist()) == ([[1.5], [0.0]], [[2], [-1]])


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ({"scoring_func": "relu"}, "scoring_func"),
        ({"num_expert_group": 2, "topk_group": 1, "group_ranking": "mean"}, "group_ranking"),
    ],
)
def test_an_unknown_method_is_refused_by_name(method, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        route(torch.zeros(1, 4), 1, **method)


def test_softmax_agrees_with_fifty_digits():
    getcontext().prec = 50
    rows = [[0.1, -3.7, 12.25, 12.125], [-700.5, -701.0, -699.25, -740.0], [88.0, -88.0, 87.875, 0.0]]
    for row, got in zip(rows, softmax(torch.tensor(rows, dtype=torch.float64)).tolist(), strict=True):
        parts = [Decimal(value).exp() for value in row]
        exact = [float(part / sum(parts)) for part in parts]
        assert got == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("groups", [1, 2])
def test_routing_of_no_token_is_empty(groups):
    weights, ids = route(torch.empty(0, 4), 2, num_expert_group=groups)
    assert weights.shape == ids.shape == (0, 2)
