"""Every nasty case that the design names is really drawn, and looked for in the tensors and not in the spec's words.

What is measured is what the gate runs for one variant (experts 360 cases beside those that are pinned, routing 348,
alignment 150, batched format 80), and, so that no lucky seed hides a hole, as much under two other seeds. Each case
must come up three times in each of them.
"""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings

from moegate.conformance.cases import build_align, build_batched, build_experts, build_routing
from moegate.conformance.coverage import pinned_experts
from moegate.conformance.pairwise import pairs_of
from moegate.conformance.profiles import explore
from moegate.conformance.properties.num import reference_of
from moegate.conformance.properties.path import expects_naive_blocks
from moegate.conformance.selection import SELECTION
from moegate.conformance.spec import ACTIVATIONS, BIASES, COUNTS, DTYPES, LOGITS, ROUTINGS, SCHEMES, TILE, WEIGHTS
from moegate.conformance.strategies import (
    MANY_PAIRS,
    POOLS,
    align_specs,
    batched_specs,
    experts_specs,
    is_routing,
    pinned_aligns,
    pinned_routings,
    quantize_specs,
    routing_dtypes,
    routing_features,
    routing_specs,
)
from moegate.conformance.subject import ROUTING_METHODS, Capabilities

ANY = Capabilities(**ROUTING_METHODS, schemes=tuple(SCHEMES), activations=tuple(ACTIVATIONS), biases=BIASES)


def drawn(strategy, name, examples):
    """What the gate draws under a name."""
    specs = []
    explore(strategy, specs.append, name=name, examples=examples)
    return specs


@pytest.fixture(autouse=True)
def _gate(monkeypatch):
    monkeypatch.setattr(SELECTION, "profile", "gate")
    monkeypatch.setattr(SELECTION, "spec", None)
    monkeypatch.setattr(SELECTION, "scale", 1.0)


def counts_of(case):
    """Pairs of each global expert."""
    ids = case.topk_ids.long().flatten()
    return torch.bincount(ids[ids >= 0], minlength=case.num_experts)


def rms(values):
    return float(values.double().square().mean().sqrt())


def exponent_range(values):
    return float(values[values != 0].double().abs().log2().quantile(torch.tensor([0.05, 0.95]).double()).diff())


def gate_up(case):
    """Gate and up rows of the first expert's weight, as they are meant; up is zero where nothing is gated."""
    weight = case.layer()["w13"]
    weight = case.w13[0].double() if weight is case.w13 else weight.expert(0)
    gate, up = case.activation.split(weight.T)
    return gate.T, up.T


def stored_in(case, dtype):
    return case.stored is not None and case.w13.dtype == dtype


def quantised_rows(case):
    """The second GEMM's input over its scale, of a scheme that quantises it."""
    how = case.layer()["quantize_hidden"]
    hidden = reference_of(case).activated.flatten(0, 1)
    return (hidden / how.scales(hidden)).abs() if how is not None and len(hidden) else torch.zeros(1)


# What the schemes, activations and biases bring.
LAYERS = {
    "fp8 weights of 448, subnormals and zeros": lambda c: (
        stored_in(c, torch.float8_e4m3fn)
        and (c.w13.float().abs() == 448).any()
        and ((c.w13.float().abs() < 2**-6) & (c.w13.float() != 0)).any()
        and (c.w13.float() == 0).any()
    ),
    "int8 weights of 127 and -127": lambda c: stored_in(c, torch.int8) and c.w13.max() == 127 and c.w13.min() == -127,
    "nibbles of 0 and 15": lambda c: stored_in(c, torch.uint8) and {0, 15} <= set((c.w13 & 15).unique().tolist()),
    "zero points of 0 and 15": lambda c: (
        c.stored is not None
        and c.stored.w13_zero_point is not None
        and {0, 15} <= set((c.stored.w13_zero_point >> 4).unique().tolist())
    ),
    "scales of widely spread exponents": lambda c: (
        c.stored is not None and c.stored.w2_scale.numel() > 9 and exponent_range(c.stored.w2_scale) > 4
    ),
    "hidden rows that a static scale clamps": lambda c: (
        c.activation_scale == "static" and quantised_rows(c).max() > 448
    ),
    "hidden rows that a static scale makes subnormal": lambda c: (
        c.activation_scale == "static" and 0 < quantised_rows(c).median() < 2**-6
    ),
    "a token of zeros": lambda c: (
        c.activation_scale in ("token", "group") and (c.hidden_states == 0).all(dim=-1).any()
    ),
    "a group of zeros beside others": lambda c: (
        c.activation_scale == "group"
        and ((c.hidden_states[..., : c.stored.block_shape[1]] == 0).all(dim=-1) & (c.hidden_states != 0).any(-1)).any()
    ),
    "an activation without a gate": lambda c: not c.activation.is_gated,
    "alternating rows": lambda c: c.activation.interleaved,
    "a bias of one GEMM alone": lambda c: (c.w13_bias is None) != (c.w2_bias is None),
    "a float32 bias beside others": lambda c: (
        c.w13_bias is not None and c.w13_bias.dtype != c.hidden_states.dtype
    ),
}  # fmt: skip


PAIRS = {
    "an empty expert": lambda c: len(c.topk_ids) > 1 and (counts_of(c) == 0).any() and (counts_of(c) > 0).sum() > 1,
    "all tokens to one expert": lambda c: len(c.topk_ids) > 1 and c.num_experts > 1 and (counts_of(c) > 0).sum() == 1,
    "a count of tile - 1": lambda c: (counts_of(c) == TILE - 1).any(),
    "a count of tile": lambda c: (counts_of(c) == TILE).any(),
    "a count of tile + 1": lambda c: (counts_of(c) == TILE + 1).any(),
    "more than one block of an expert": lambda c: (counts_of(c) > TILE).any(),
    "zero tokens": lambda c: len(c.topk_ids) == 0,
    "a rank that owns nothing": lambda c: c.expert_map is not None and (c.expert_map < 0).all(),
    "a rank that owns a part": lambda c: c.expert_map is not None and 0 < (c.expert_map >= 0).sum() < c.num_experts,
    "some ids of -1": lambda c: (c.topk_ids < 0).any() and (c.topk_ids >= 0).any(),
    "no id but -1": lambda c: len(c.topk_ids) > 0 and (c.topk_ids < 0).all(),
    "an expert twice in a row": lambda c: (
        c.topk_ids.shape[1] > 1 and (c.topk_ids.sort(1).values.diff(dim=1) == 0).any()
    ),
    "top_k = E": lambda c: len(c.topk_ids) and c.topk_ids.shape[1] == c.num_experts > 1,
    "top_k = 1": lambda c: len(c.topk_ids) and c.topk_ids.shape[1] == 1 < c.num_experts,
    "E not a power of two": lambda c: c.num_experts & (c.num_experts - 1) != 0,
}
EXPERTS = {
    **PAIRS,
    **LAYERS,
    "ragged H": lambda c: c.w2.shape[1] % TILE != 0,
    "ragged I": lambda c: c.w2.shape[2] % TILE != 0,
    "odd sizes": lambda c: c.w2.shape[1] % 2 and c.w2.shape[2] % 2,
    "widely spread exponents": lambda c: exponent_range(gate_up(c)[0]) > 7,
    "gate and up of unequal size": lambda c: rms(gate_up(c)[1]) > 8 * rms(gate_up(c)[0]),
    "naive blocks": lambda c: c.num_tokens > 0 and expects_naive_blocks(c),
    "naive blocks at the threshold": lambda c: expects_naive_blocks(c) and c.num_tokens * c.top_k * 4 == c.num_experts,
    "top_k = 1 with the weight on the input": lambda c: c.num_tokens > 0 and c.apply_router_weight_on_input,
    "rows farther apart than wide": lambda c: c.num_tokens > 1 and c.hidden_states.stride(0) > c.hidden_states.shape[1],
    "a routing weight of zero": lambda c: (c.topk_weights == 0).any(),
}


def ranks(case):
    """What float32 compares experts by where there is a bias, else nothing."""
    bias = case.e_score_correction_bias
    if bias is None or case.custom_answer is not None or case.num_real_tokens == 0:
        return torch.empty(0, 1)
    logits = case.router_logits[: case.num_real_tokens].float()
    if not logits.isfinite().all():
        return torch.empty(0, 1)
    scores = logits.softmax(dim=1) if case.scoring_func == "softmax" else logits.sigmoid()
    return scores + bias.float()


def tie_of_rank_at_k(case):
    """The last chosen and the first other one tie in score plus bias, and differ from another expert."""
    ordered = ranks(case).sort(dim=1, descending=True).values
    if case.num_expert_group is not None or case.top_k >= ordered.shape[1]:
        return False
    last, following = ordered[:, case.top_k - 1], ordered[:, case.top_k]
    return ((last == following) & (ordered[:, 0] > ordered[:, -1])).any()


def reverses(case):
    """The bias's best expert is not the logits' in any row."""
    found = ranks(case)
    best = case.router_logits[: len(found)].argmax(dim=1)
    return len(found) and found.shape[1] > 8 and (found.argmax(dim=1) != best).all()


def equal_groups(case):
    """Restricted groups whose logits are all the same, without a bias that tells them apart."""
    bias, count = case.e_score_correction_bias, case.num_expert_group or 1
    if count == (case.topk_group or 1) or case.num_real_tokens == 0:
        return False
    groups = case.router_logits[: case.num_real_tokens].unflatten(1, (count, -1))
    return (groups == groups[:, :1]).all() and (bias is None or bias.unique().numel() == 1)


def is_grouped(case):
    return case.num_expert_group is not None and case.topk_group < case.num_expert_group and case.num_real_tokens


def tie_at_k(case):
    if case.top_k == case.router_logits.shape[1]:
        return False
    ordered = case.router_logits.nan_to_num(-1e9).sort(dim=1, descending=True).values
    last, following = ordered[:, case.top_k - 1], ordered[:, case.top_k]
    return ((last == following) & (ordered[:, 0] > last)).any()


def saturates(case):
    """Some softmax weight underflows in float32 beside another."""
    logits = case.router_logits.float()
    finite = logits[logits.isfinite().all(dim=1)]
    return len(finite) and (finite.amax(dim=1) - finite.amin(dim=1)).max() > 104


ROUTING = {
    "a tie at the k-th score": tie_at_k,
    "bit-equal rows": lambda c: c.router_logits.numel() > 1 and c.router_logits.unique().numel() == 1,
    "a NaN among numbers": lambda c: (c.router_logits.isnan().any(1) & ~c.router_logits.isnan().all(1)).any(),
    "a row of NaN": lambda c: c.router_logits.isnan().all(dim=1).any(),
    "a row of -inf": lambda c: (c.router_logits == -torch.inf).all(dim=1).any(),
    "+inf": lambda c: (c.router_logits == torch.inf).any(),
    "logits that saturate": saturates,
    "zero tokens": lambda c: c.router_logits.shape[0] == 0,
    "top_k = E": lambda c: c.router_logits.shape[0] and c.top_k == c.router_logits.shape[1] > 1,
    "E not a power of two": lambda c: c.router_logits.shape[1] & (c.router_logits.shape[1] - 1),
    "rows farther apart than wide": lambda c: (
        len(c.router_logits) > 1 and c.router_logits.stride(0) > c.router_logits.shape[1]
    ),
    "weights as they are": lambda c: not c.renormalize,
    **{
        f"{scoring} scores of real tokens": lambda c, scoring=scoring: (
            c.scoring_func == scoring and c.custom_answer is None and c.num_real_tokens
        )
        for scoring in ("softmax", "sigmoid", "sqrtsoftplus")
    },
    "softmax and nothing else": lambda c: (
        c.scoring_func == "softmax"
        and c.num_expert_group is c.e_score_correction_bias is c.custom_answer is None
        and c.num_real_tokens
    ),
    "a custom function": lambda c: c.custom_answer is not None and c.num_real_tokens,
    "groups by their maximum": lambda c: is_grouped(c) and c.group_ranking == "max",
    "groups by the sum of two": lambda c: is_grouped(c) and c.group_ranking == "top2_sum",
    "one group": lambda c: c.num_expert_group == 1,
    "all groups kept": lambda c: c.num_expert_group == c.topk_group != 1,
    "groups of one": lambda c: c.num_expert_group == c.router_logits.shape[1] > 1,
    "equal groups": equal_groups,
    "groups and a bias": lambda c: is_grouped(c) and c.e_score_correction_bias is not None,
    "as many choices as the groups hold": lambda c: (
        is_grouped(c) and c.top_k == c.topk_group * c.router_logits.shape[1] // c.num_expert_group
    ),
    "a bias that decides alone": reverses,
    "a tie of score and bias at the k-th": tie_of_rank_at_k,
    "every rank negative": lambda c: ranks(c).numel() and (ranks(c) < 0).all(),
    "a bias in bfloat16": lambda c: (
        c.e_score_correction_bias is not None and c.e_score_correction_bias.dtype == torch.bfloat16
    ),
    "scores that saturate in float32": lambda c: (
        c.scoring_func == "sigmoid" and c.num_real_tokens and (c.router_logits.float().sigmoid() == 1).any()
    ),
    "every score 0": lambda c: (
        c.scoring_func != "softmax" and (c.router_logits[: c.num_real_tokens] == -torch.inf).all(dim=1).any()
    ),
    "a scaling factor and renormalised weights": lambda c: c.renormalize and c.routed_scaling_factor != 1,
    "a scaling factor and weights as they are": lambda c: not c.renormalize and c.routed_scaling_factor != 1,
    "some tokens are padding": lambda c: 0 < c.num_real_tokens < len(c.router_logits),
    "all tokens are padding": lambda c: len(c.router_logits) and c.num_real_tokens == 0,
}
ALIGN = {
    **{name: holds for name, holds in PAIRS.items() if "tile" not in name},
    "a count of block - 1": lambda c: (counts_of(c) == c.block_size - 1).any(),
    "a count of block": lambda c: (counts_of(c) == c.block_size).any(),
    "a count of block + 1": lambda c: (counts_of(c) == c.block_size + 1).any(),
    "more pairs than one launch sorts": lambda c: c.topk_ids.numel() > MANY_PAIRS,
}
BATCHED = {
    "no row": lambda c: c.hidden_states.shape[1] == 0,
    "no token": lambda c: c.hidden_states.numel() and not c.is_token.any(),
    "full slabs": lambda c: c.hidden_states.numel() and c.is_token.all(),
    "an empty expert beside one that is not": lambda c: 0 < c.is_token.any(dim=1).sum() < len(c.w13),
    "all tokens to one expert": lambda c: len(c.w13) > 1 and c.is_token.any(dim=1).sum() == 1,
    "a count of tile - 1": lambda c: (c.expert_num_tokens == TILE - 1).any(),
    "a count of tile": lambda c: (c.expert_num_tokens == TILE).any(),
    "a count of tile + 1": lambda c: (c.expert_num_tokens == TILE + 1).any(),
    "several blocks of an expert and rows behind them": lambda c: (
        (c.expert_num_tokens > TILE) & (c.expert_num_tokens < c.hidden_states.shape[1])
    ).any(),
    "uneven counts": lambda c: c.expert_num_tokens.unique().numel() > 2,
    "ragged H and I": lambda c: c.w2.shape[1] % TILE != 0 and c.w2.shape[2] % TILE != 0,
    "widely spread exponents": lambda c: exponent_range(gate_up(c)[0]) > 7,
    "rows farther apart than wide": lambda c: (
        c.hidden_states.shape[1] > 1 and c.hidden_states.stride(1) > c.hidden_states.shape[2]
    ),
}


PINNED = pinned_experts("cpu", ANY)


def experts_of_the_gate(series):
    yield from PINNED
    for dtype in DTYPES:
        for few in (True, False):
            strategy = experts_specs("cpu", ANY, dtypes=(dtype,), low_latency=few)
            yield from drawn(strategy, f"{series}/{dtype}/{few}", 60)


def routings_of_the_gate(series):
    return [*pinned_routings("cpu", ANY), *drawn(routing_specs("cpu", ANY), series, 240)]


def aligns_of_the_gate(series):
    return [*pinned_aligns("cpu", ANY), *drawn(align_specs("cpu", ANY), series, 150)]


# What a family draws for one variant under a name, how a case is built, what is looked for, and in how many cases.
FAMILIES = {
    "NUM": (experts_of_the_gate, build_experts, EXPERTS, 360 + len(PINNED)),
    "ROUTE": (routings_of_the_gate, build_routing, ROUTING, 361),
    "ALIGN": (aligns_of_the_gate, build_align, ALIGN, 180),
    "BATCHED": (lambda series: drawn(batched_specs("cpu", ANY), series, 80), build_batched, BATCHED, 80),
}


@pytest.mark.parametrize("series", ["triton", "another", "a third"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_nasty_case_is_drawn_at_least_thrice(family, series):
    draw, build, looked_for, examples = FAMILIES[family]
    cases = [build(spec) for spec in draw(f"{family}/{series}")]
    assert examples <= len(cases) <= examples + 10
    seen = {name: sum(bool(holds(case)) for case in cases) for name, holds in looked_for.items()}
    assert {name: count for name, count in seen.items() if count < 3} == {}, seen


def test_the_gate_draws_the_same_cases_every_time():
    once, again = (drawn(routing_specs("cpu", ANY), "ROUTE/triton", 30) for _ in range(2))
    assert once == again != drawn(routing_specs("cpu", ANY), "ROUTE/cpu", 30)


FEW = Capabilities(
    dtypes=("float16",),
    routings=ROUTINGS[:1],
    weights=WEIGHTS[:2],
    maps=("none", "linear"),
    counts=COUNTS[-2:],
    logits=LOGITS[:1],
    schemes=("none", "fp8_channel_token"),
    activations=("gelu",),
    biases=("w13",),
    weight_on_input=False,
    padded_rows=False,
    empty=False,
)


@pytest.mark.parametrize("device", POOLS)
def test_alignments_have_no_more_experts_than_a_subject_takes(device):
    able = replace(ANY, min_experts=2, max_experts=40, max_top_k=3)
    specs = [*pinned_aligns(device, able), *drawn(align_specs(device, able), "limits", 150)]
    assert {spec.routing for spec in specs} == set(able.routings)
    assert all(2 <= spec.E <= 40 and spec.top_k <= 3 for spec in specs)


@pytest.mark.parametrize("device", POOLS)
@pytest.mark.parametrize("capabilities", [ANY, FEW], ids=["everything", "little"])
@pytest.mark.parametrize("strategy", [experts_specs, align_specs, routing_specs, batched_specs, quantize_specs])
def test_only_what_a_subject_declares_is_drawn(strategy, capabilities, device):
    declared = {
        "dtype": capabilities.dtypes,
        "routing": capabilities.routings,
        "weights": capabilities.weights,
        "expert_map": capabilities.maps,
        "logits": capabilities.logits,
        "counts": capabilities.counts,
        "scheme": capabilities.schemes,
        "activation": capabilities.activations,
        "bias": capabilities.biases,
        "quantizer": capabilities.quantizers,
        "weight_on_input": (False, capabilities.weight_on_input),
        "padded_rows": (False, capabilities.padded_rows),
        "scoring": capabilities.scorings,
        "groups": capabilities.groups,
        "group_ranking": capabilities.group_rankings,
        "correction_bias": capabilities.correction_biases,
        "scaling": capabilities.scalings,
        "padding": capabilities.paddings,
    }

    @settings(max_examples=100, database=None, deadline=None)
    @given(strategy(device, capabilities))
    def only(spec):
        for name, value in spec.features().items():
            assert value in declared.get(name, (value,)), name
        if strategy is quantize_specs:
            assert spec.rows > 0 or capabilities.empty
        elif strategy is batched_specs:
            assert (spec.max_tokens > 0 and spec.counts != "zero") or capabilities.empty
        else:
            assert spec.M > 0 or capabilities.empty
            assert 1 <= spec.top_k <= spec.E
        if strategy is routing_specs:
            assert spec.top_k <= spec.most_choices()
        if strategy is experts_specs:
            assert spec.top_k == 1 or not spec.weight_on_input
        if strategy in (experts_specs, batched_specs):
            size = (spec.H, spec.I, spec.block_n, spec.block_k)
            assert size in POOLS[device].shapes_of(spec.scheme)
            assert spec.scheme == "none" or spec.dtype in POOLS[device].scaled_dtypes

    only()


@pytest.mark.parametrize("device", POOLS)
def test_every_pair_of_routing_features_that_go_together_is_always_run(device):
    features = routing_features(device, ANY)
    reads = ("scoring", "groups", "group_ranking", "correction_bias", "E", "top_k")
    methods = [dict(zip(reads, values, strict=True)) for values in product(*(features[name] for name in reads))]
    possible = set().union(*(pairs_of(method) for method in methods if is_routing(method)))
    # What the constraint does not read goes with everything that goes with anything.
    values_that_go = {(name, value) for pair in possible for name, value in pair}
    for a, b in combinations(sorted(features), 2):
        if a not in reads or b not in reads:
            possible |= {
                ((a, x), (b, y))
                for x, y in product(features[a], features[b])
                if all(name not in reads or (name, value) in values_that_go for name, value in ((a, x), (b, y)))
            }
    run = pinned_routings(device, ANY)
    assert len(run) < 130
    features_run = ({**spec.features(), "E": spec.E, "top_k": spec.top_k} for spec in run)
    assert possible - set().union(*map(pairs_of, features_run)) == set()


@pytest.mark.parametrize("few", [True, False])
def test_the_path_that_was_asked_for_is_drawn(few):
    for spec in drawn(experts_specs("cpu", ANY, low_latency=few), f"path/{few}", 100):
        is_naive = spec.expert_map == "none" and spec.M * spec.top_k * 4 <= spec.E
        assert is_naive or not few


def test_every_dtype_of_a_routing_is_met_on_a_gpu_though_a_rare_size_has_one_alone():
    capabilities, pools = ANY, POOLS["cuda"]
    sizes = {*pools.routing_experts, *pools.scored_experts, *pools.grouped_experts}
    drawn = {size: routing_dtypes("cuda", capabilities, size) for size in sizes}
    assert {size for size, dtypes in drawn.items() if len(dtypes) > 1} == set(pools.grouped_experts)
    pinned = {(spec.E, spec.dtype) for spec in pinned_routings("cuda", capabilities)}
    assert pinned >= set(product(pools.grouped_experts, capabilities.dtypes))
