"""The pinned specs hold every declared pair of features, and each scheme takes every turn of a kernel on each path."""

from itertools import combinations

import pytest

from moegate.conformance.cases import build_batched, build_experts
from moegate.conformance.coverage import (
    batched_features,
    declared_pairs,
    experts_features,
    is_possible,
    pinned_experts,
    pinned_slabs,
    rows,
)
from moegate.conformance.spec import ACTIVATIONS, BIASES, SCHEMES, TILE
from moegate.conformance.strategies import POOLS
from moegate.conformance.subject import Capabilities
from moegate.reference.experts import to_local_ids

ALL = Capabilities(schemes=tuple(SCHEMES), activations=tuple(ACTIVATIONS), biases=BIASES)
# Rows, columns and inner elements that one program of the interpreted kernels takes at a time.
BLOCK_M, BLOCK_N, BLOCK_K = TILE, 32, 32


def held(specs):
    return {f"{a} & {b}" for spec in specs for a, b in spec.feature_pairs()}


@pytest.mark.parametrize("device", POOLS)
def test_pinned_specs_hold_every_declared_pair(device):
    assert declared_pairs(device, ALL) - held(pinned_experts(device, ALL)) == set()
    assert declared_pairs(device, ALL, batched=True) - held(pinned_slabs(device, ALL)) == set()


@pytest.mark.parametrize("features", [experts_features(ALL), batched_features(ALL)], ids=["standard", "batched"])
def test_a_pair_is_undeclared_only_where_a_rule_forbids_it(features):
    declared = declared_pairs("cpu", ALL, batched=features["format"] == ("batched",))
    for a, b in combinations(sorted(features), 2):
        for x in features[a]:
            for y in features[b]:
                alone = {"format": features["format"][0], a: x, b: y}
                assert (f"{a}={x} & {b}={y}" in declared) == is_possible(alone), alone


def test_there_are_few_of_them():
    for batched, pinned in ((False, pinned_experts), (True, pinned_slabs)):
        needed = len(rows("cpu", ALL, batched=batched))
        assert 99 <= needed <= 120  # eleven schemes with nine activations take 99 at the least
        assert needed <= len(pinned("cpu", ALL)) <= 1.4 * needed


def test_a_small_subject_gets_only_what_it_declares():
    small = Capabilities(("cpu",), ("bfloat16",), maps=("none",), weight_on_input=False, padded_rows=False)
    for spec in pinned_experts("cpu", small):
        assert (spec.dtype, spec.scheme, spec.activation, spec.bias) == ("bfloat16", "none", "silu", "none")
        assert (spec.expert_map, spec.weight_on_input, spec.padded_rows) == ("none", False, False)


def steps_with_a_tail(size, block):
    """Whether a dimension takes two steps or more, and the last one is not full."""
    return size > block and size % block != 0


def gemms(case):
    """N and K of both GEMMs."""
    layer = case.layer()
    return [layer[name].shape[1:] for name in ("w13", "w2")]


def grids(case):
    """Rows, columns and block sizes of both weights' grids of scales, gate and up apart."""
    bn, bk = case.stored.block_shape
    for number, (n, k) in enumerate(gemms(case)):
        yield n // (2 if case.activation.is_gated and number == 0 else 1), bn, k, bk


def most_pairs_of_an_expert(case):
    local = to_local_ids(case.topk_ids, case.expert_map).flatten()
    counts = local[local >= 0].bincount()
    return int(counts.max()) if counts.numel() else 0


TURNS = {
    "two K steps with a tail": lambda case, path: any(steps_with_a_tail(k, BLOCK_K) for _, k in gemms(case)),
    "two N tiles with a tail": lambda case, path: any(steps_with_a_tail(n, BLOCK_N) for n, _ in gemms(case)),
    # A naive block holds one pair.
    "two blocks of one expert": lambda case, path: most_pairs_of_an_expert(case) > (1 if path == "naive" else BLOCK_M),
}
SCALE_TURNS = {
    "two scale blocks along N, the last cut off": lambda case: any(n > bn and n % bn for n, bn, _, _ in grids(case)),
    "two scale blocks along K, the last cut off": lambda case: any(k > bk and k % bk for _, _, k, bk in grids(case)),
    "a grid of scales that is not square": lambda case: any(-(-n // bn) != -(-k // bk) for n, bn, k, bk in grids(case)),
}


@pytest.fixture(scope="module")
def pinned():
    """Path, scheme and case of every pinned CPU spec."""
    standard = [(s.features()["path"], s.scheme, build_experts(s)) for s in pinned_experts("cpu", ALL)]
    slabs = [("batched", s.scheme, build_batched(s).routed()) for s in pinned_slabs("cpu", ALL)]
    return standard + slabs


@pytest.mark.parametrize("turn", TURNS)
def test_each_scheme_takes_each_turn_on_each_path(pinned, turn):
    counts = {
        (path, scheme): 0
        for path in ("aligned", "naive", "batched")
        for scheme in SCHEMES
        if path != "naive" or SCHEMES[scheme].weight_scale != "group"
    }
    for path, scheme, case in pinned:
        counts[path, scheme] += bool(TURNS[turn](case, path))
    assert min(counts.values()) >= 1, {where: n for where, n in counts.items() if n == 0}


@pytest.mark.parametrize("turn", SCALE_TURNS)
@pytest.mark.parametrize("path", ["aligned", "naive", "batched"])
def test_blocks_of_scales_take_each_turn_on_each_path(pinned, path, turn):
    assert sum(bool(SCALE_TURNS[turn](case)) for p, scheme, case in pinned if (p, scheme) == (path, "fp8_block")) >= 1


@pytest.mark.parametrize("path", ["aligned", "batched"])
def test_groups_of_scales_come_several_to_a_row_and_smaller_than_a_step(pinned, path):
    for scheme in ("int8_w8a16_group", "int4_group", "int4_group_zp"):
        blocks = [case.stored.block_shape[1] for p, s, case in pinned if (p, s) == (path, scheme)]
        assert min(blocks) < BLOCK_K <= max(blocks)
