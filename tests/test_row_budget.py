"""A row's error is judged by how many causes it has: one is a number like another, many average out."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2

from moegate.conformance.budget import WANDERING, chance_of_row, experts_budget
from moegate.conformance.calibrate import PER_CASE
from moegate.conformance.calibration import limits
from moegate.conformance.cases import build_batched, build_experts
from moegate.conformance.loading import load_subject
from moegate.conformance.properties.num import budget_of, judge_values, reference_of
from moegate.conformance.spec import BatchedSpec, ExpertsSpec
from moegate.conformance.statistics import statistics

# Of one hidden value of token 19, which makes most of the row.
DOMINATED = ExpertsSpec(M=20, H=96, I=16, E=2, top_k=2, dtype="float32", expert_map="linear", seed=12)


def verdicts_on(case, output, numerics):
    trace = reference_of(case)
    return {v.property.id: v for v in judge_values(case, output, trace, budget_of(case, trace, numerics))}


def test_an_honest_row_whose_error_is_one_hidden_value_s_is_no_finding():
    """It was: 1.06 of the limit, by torch and by moegate's backend on the CPU."""
    torch_layer, case = load_subject("torch"), build_experts(DOMINATED)
    verdict = verdicts_on(case, torch_layer.experts(case, "default"), torch_layer.numerics)["NUM-02"]
    assert verdict.holds
    assert verdict.budget_used is not None
    assert verdict.budget_used < 0.85


# One of 256 products of token 266 sums to 1.4 on a way past 32: partial sums are five times what they are on average.
WANDERING_SUM = ExpertsSpec(
    M=267,
    H=256,
    I=128,
    E=8,
    top_k=2,
    dtype="float32",
    routing="one_expert",
    weights="softmax",
    expert_map="owns_all",
    values="asymmetric",
    activation="swigluoai_interleaved",
    seed=6,
)


def test_an_honest_row_of_which_one_sum_wandered_is_no_finding():
    """It was, of every subject, on CPU and GPU: 1.05 of the limit."""
    torch_layer, case = load_subject("torch"), build_experts(WANDERING_SUM)
    verdict = verdicts_on(case, torch_layer.experts(case, "default"), torch_layer.numerics)["NUM-02"]
    assert verdict.holds
    assert verdict.budget_used is not None
    assert 0.8 < verdict.budget_used < 0.95


# Nine hidden values of ten are under fp8's least number, so that what flips flips at the one midpoint below it: 87 of
# 87 to zero, as bfloat16 rounds what is just above the midpoint onto it.
AT_ONE_MIDPOINT = BatchedSpec(
    max_tokens=200,
    H=320,
    I=464,
    E=1,
    counts="full",
    values="spread",
    scheme="fp8_tensor_static",
    activation="swigluoai_interleaved",
    seed=56,
)


def test_values_that_all_flip_to_zero_at_one_midpoint_scale_no_expert_s_share():
    """They did: 1.3 of the limit by torch, 1.06 by moegate's kernels."""
    torch_layer, case = load_subject("torch"), build_batched(AT_ONE_MIDPOINT).routed()
    verdict = verdicts_on(case, torch_layer.experts(case, "default"), torch_layer.numerics)["NUM-04"]
    assert verdict.holds
    assert verdict.budget_used is not None
    assert 0.2 < verdict.budget_used < 0.5


def test_a_share_that_is_scaled_as_much_is_still_found_where_nothing_leans():
    torch_layer, case = load_subject("torch"), build_batched(AT_ONE_MIDPOINT).routed()
    case = replace(case, hidden_states=case.hidden_states * 32)
    output = 0.97 * torch_layer.experts(case, "default").double()
    assert not verdicts_on(case, output.to(case.hidden_states.dtype), torch_layer.numerics)["NUM-04"].holds


def test_sums_have_the_tail_that_the_way_of_their_partial_sums_gives_them():
    """Simulated: 4,000 sums of 512 random terms that end at zero, added up in float32's way."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(4000, 512, generator=generator, dtype=torch.float64)
    terms -= terms.mean(dim=1, keepdim=True)
    partial = terms.cumsum(dim=1)
    errors = ((torch.rand(partial.shape, generator=generator, dtype=torch.float64) - 0.5) * partial).sum(dim=1)
    kurtosis = float((errors**4).mean() / (errors**2).mean() ** 2)
    assert 2 / (kurtosis - 1) == pytest.approx(WANDERING, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_one_hidden_value_stay_within_the_limit_of_what_chance_allows(seed):
    """Of I = 1 a row has one cause: nothing averages out, and nothing else than an element's own limit is right."""
    torch_layer = load_subject("torch")
    case = build_experts(ExpertsSpec(M=300, H=64, I=1, E=2, top_k=1, dtype="float32", seed=seed))
    trace = reference_of(case)
    budget = budget_of(case, trace, torch_layer.numerics)
    assert (budget.of_row() > 1.5 * (budget.sigma**2 + budget.last**2).sum(dim=1).sqrt()).all()
    measured = statistics(torch_layer.experts(case, "default"), trace, budget, case.operands().w2)
    assert 0.2 < float(measured.row_rms.max()) < limits().row_rms


def test_an_error_in_every_column_is_found_where_each_column_is_within_its_own_limit():
    """A row of many causes: 1.3 times what the columns may be off, where one of them alone may be 2.7 times off."""
    torch_layer = load_subject("torch")
    case = build_experts(ExpertsSpec(M=4, H=256, I=128, E=2, top_k=2, seed=1))
    trace = reference_of(case)
    budget = budget_of(case, trace, torch_layer.numerics)
    signs = torch.where(torch.arange(256) % 2 == 0, 1.0, -1.0)
    output = trace.output + 1.3 * signs * (budget.sigma**2 + budget.last**2).sqrt()
    found = verdicts_on(case, output, torch_layer.numerics)
    assert found["NUM-01"].holds
    assert not found["NUM-02"].holds


def test_repeated_experts_are_one_cause():
    """A token that lists an expert twice has the same error twice: as few causes as where it lists it once."""
    numerics = load_subject("torch").numerics
    case = build_experts(ExpertsSpec(M=8, H=96, I=16, E=1, top_k=1, dtype="float32", seed=3))
    twice = replace(case.operands(), topk_ids=case.topk_ids.repeat(1, 2), topk_weights=case.topk_weights.repeat(1, 2))
    of_one, of_two = (experts_budget(call.trace(), call, numerics) for call in (case.operands(), twice))
    # The shares' variance is that of one of twice the size.
    assert torch.allclose(of_two.of_causes, 16 * of_one.of_causes, rtol=0.2)


def test_the_chance_of_a_row_is_that_of_a_mean_of_squares_and_never_under_all_errors_at_their_largest():
    freedom = torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0, 100.0, 1e9])
    exact = torch.from_numpy(chi2.isf(PER_CASE, freedom.numpy()) / freedom.numpy() / 3).sqrt()
    chance = chance_of_row(freedom).double()
    assert torch.allclose(chance[:5], exact[:5], rtol=0.08)
    assert (chance[:5] >= exact[:5]).all()
    assert (chance[5:] == 1).all()
