"""Where experts live, which copy a pair goes to, and shards of I: pure functions, one rank at a time."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moegate.impl.parallel.mesh import Mesh
from moegate.impl.parallel.placement import (
    ExpertPlacement,
    balanced_placement,
    choose_copies,
    linear_placement,
    round_robin_placement,
)
from moegate.impl.parallel.shards import experts_of_rank, shard_of_experts
from moegate.impl.parallel.travel import Homes, plan_travel, sum_over_ranks
from moegate.impl.parallel.wire import Tokens, Wire
from moegate.impl.quantize import quantize_experts
from moegate.impl.weights import ExpertsWeights


@given(st.integers(1, 300), st.integers(1, 64))
def test_every_expert_lives_once_and_ranks_differ_by_one_at_most(num_experts, num_ranks):
    for place in (linear_placement, round_robin_placement):
        if num_ranks > num_experts:
            with pytest.raises(ValueError, match=f"num_ranks: expected at most num_experts {num_experts}"):
                place(num_experts, num_ranks)
            continue
        placement = place(num_experts, num_ranks)
        sizes = [len(experts) for experts in placement.experts_of_rank]
        assert sorted(placement.physical_to_logical) == list(range(num_experts))
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)  # the first ranks take the remainder


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(1, 8), st.integers(0, 5))
def test_copies_go_to_the_most_loaded_and_never_twice_to_a_rank(load, num_ranks, spare):
    slots = min(len(load), -(-len(load) // num_ranks) + spare)
    placement = balanced_placement(load, num_ranks, slots)
    assert all(len(experts) == slots for experts in placement.experts_of_rank)
    copies = [len(physical) for physical in placement.copies]
    for a, b in product(range(len(load)), repeat=2):
        # Nobody with fewer pairs a copy got the copy that another one waits for.
        if copies[a] > 1 and copies[b] < num_ranks:
            assert load[a] / (copies[a] - 1) >= load[b] / copies[b]


@given(st.integers(0, 2**16), st.integers(0, 30), st.integers(1, 4), st.integers(0, 5))
def test_the_pairs_of_an_expert_take_its_copies_in_turn(seed, num_tokens, top_k, offset):
    generator = torch.Generator().manual_seed(seed)
    placement = ExpertPlacement(5, ((0, 1, 2), (2, 3), (), (4, 2, 0)))
    ids = torch.randint(-1, 5, (num_tokens, top_k), generator=generator)
    tables = placement.tables("cpu")
    physical = choose_copies(ids, tables, offset)
    assert torch.equal(physical, choose_copies(ids, tables, offset))
    logical = torch.tensor([*placement.physical_to_logical, -1])
    assert torch.equal(logical[physical.long()], ids)
    counts = torch.bincount(physical[physical >= 0].long(), minlength=placement.num_physical)
    for copies in placement.copies:
        taken = [int(counts[copy]) for copy in copies]
        assert max(taken) - min(taken) <= 1


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 20), st.integers(1, 4))
def test_a_token_travels_once_to_each_rank_of_its_experts_and_every_sum_comes_back(seed, num_tokens, top_k):
    generator = torch.Generator().manual_seed(seed)
    placement = ExpertPlacement(6, ((5, 0), (), (1, 2, 3), (4,)))
    tables = placement.tables("cpu")
    physical = choose_copies(torch.randint(-1, 6, (num_tokens, top_k), generator=generator), tables)
    numbers = torch.full((placement.num_ranks + 1,), -1, dtype=torch.int32)
    travel = plan_travel(physical, Homes(tables.rank_of, tables.local_of), numbers, 21)
    rank_of, sent = dict(enumerate(tables.rank_of.tolist())), []
    for rank, token in product(range(placement.num_ranks), range(num_tokens)):
        ids = physical[token].tolist()
        if any(rank_of.get(i) == rank for i in ids):
            sent.append((rank, token, [int(tables.local_of[i]) if rank_of.get(i) == rank else -1 for i in ids]))
    assert list(zip(*(of.tolist() for of in travel.rows), strict=True)) == [(rank, token) for rank, token, _ in sent]
    assert numbers.tolist() == [*(sum(to == rank for to, _, _ in sent) for rank in range(placement.num_ranks)), 21]
    x, weights = (torch.randn((num_tokens, n), generator=generator) for n in (5, top_k))
    tokens = Tokens(x, weights, physical, torch.arange(num_tokens, dtype=torch.int32))
    packed = Wire().pack(tokens, num_tokens * min(top_k, 4), travel)[: len(sent)]
    arrived = Wire().tokens(packed, tokens, ids_are_local=True)
    which = torch.tensor([token for _, token, _ in sent], dtype=torch.int64)
    assert arrived.topk_ids.tolist() == [ids for _, _, ids in sent]
    assert arrived.lora_ids is not None
    assert arrived.lora_ids.tolist() == which.tolist()
    assert torch.equal(arrived.hidden_states, x[which])
    assert torch.equal(arrived.topk_weights, weights[which])
    rows = torch.randn((len(sent), 3), generator=generator)
    expected = torch.zeros((num_tokens, 3))
    for row, (_, token, _) in zip(rows, sent, strict=True):
        expected[token] += row  # by rank, as the rows are
    assert torch.equal(sum_over_ranks(rows, travel), expected)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ExpertPlacement(3, ()), "experts_of_rank: expected at least one rank"),
        (lambda: ExpertPlacement(3, ((0, 1), (3,))), r"experts_of_rank\[1\]: expected a number in \[0, 2\], got 3"),
        (lambda: ExpertPlacement(3, ((0, 1, 1), (2,))), r"experts_of_rank\[0\]: expected each expert once"),
        (lambda: ExpertPlacement(3, ((0,), (2,))), r"expected every expert on some rank, got none with \[1\]"),
        (lambda: balanced_placement([1.0, 2.0, 3.0], 2, 1), "slots_per_rank: expected 2 ranks to hold 3 experts"),
        (lambda: balanced_placement([1.0, float("nan")], 2, 1), "load: expected numbers of at least 0"),
        (lambda: Mesh(2, 3, 2), "dp_size: expected a divisor of ep_size 2 x tp_size 2 ranks, got 3"),
        (lambda: Mesh(0), "tp_size: expected at least 1"),
        (lambda: Mesh(2, 2, 2).place(4), r"rank: expected a number in \[0, 3\], got 4"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, error):
    with pytest.raises(ValueError, match=error):
        make()


@given(st.sampled_from([(1, 4, 4), (2, 2, 2), (2, 4, 2), (2, 1, 2), (4, 2, 1), (3, 3, 2)]))
def test_peers_have_every_run_once_and_replicas_one_run(sizes):
    mesh = Mesh(*sizes)
    for rank in range(mesh.world_size):
        assert [mesh.dp_rank(peer) for peer in mesh.data_peers(rank)] == list(range(mesh.dp_size))
        assert {mesh.dp_rank(peer) for peer in mesh.replicas(rank)} == {mesh.dp_rank(rank)}
        assert rank in mesh.data_peers(rank)
        assert rank in mesh.replicas(rank)
        place = mesh.place(rank)
        assert place.ep_rank * mesh.tp_size + place.tp_rank == rank


def _dequantised(weights):
    """`[E, N, K]` float32 of both weights, whatever they are stored as."""
    from moegate.conformance.words import reference_arguments
    from moegate.reference.quantization import expert_weight

    words = reference_arguments(weights.w13, weights.w2, quant=weights.quant)
    return [
        torch.stack([expert_weight(words[name], e, torch.float64) for e in range(len(weights.w2))])
        for name in ("w13", "w2")
    ]


SCHEMES = [
    ("fp8_w8a8", {"weight_scale": "tensor"}),
    ("fp8_w8a8", {"weight_scale": "channel", "per_act_token_quant": True}),
    ("fp8_w8a8", {"weight_scale": "block", "block_shape": (32, 32)}),
    ("int8_w8a8", {"weight_scale": "channel", "per_act_token_quant": True}),
    ("int8_w8a16", {"weight_scale": "group", "block_shape": (0, 32)}),
    ("int4_w4a16", {"weight_scale": "group", "block_shape": (0, 32)}),
    ("int4_w4a16", {"weight_scale": "group", "block_shape": (0, 32), "zero_points": True}),
]


@pytest.mark.parametrize(("scheme", "options"), SCHEMES)
def test_shards_of_stored_weights_are_the_columns_of_what_they_mean(scheme, options):
    torch.manual_seed(3)
    w13, w2, quant = quantize_experts(torch.randn(3, 256, 64), torch.randn(3, 64, 128), scheme, **options)
    w13_bias, w2_bias = torch.randn(3, 256), torch.randn(3, 64)
    whole = ExpertsWeights(w13, w2, w13_bias, w2_bias, quant)
    w13, w2 = _dequantised(whole)
    for rank in range(2):
        shard = shard_of_experts(whole, rank, 2)
        columns = slice(64 * rank, 64 * rank + 64)
        of_w13, of_w2 = _dequantised(shard)
        assert torch.equal(of_w13, w13.unflatten(1, (2, 128))[:, :, columns].flatten(1, 2))
        assert torch.equal(of_w2, w2[:, :, columns])
        assert torch.equal(shard.w13_bias, w13_bias.unflatten(1, (2, 128))[:, :, columns].flatten(1, 2))
        assert torch.equal(shard.w2_bias, w2_bias * (rank == 0))
    some = experts_of_rank(whole, (2, 0))
    assert all(torch.equal(a, b[[2, 0]]) for a, b in zip(_dequantised(some), (w13, w2), strict=True))
    assert len(experts_of_rank(whole, ()).w2) == 0


def test_a_shard_that_cuts_a_block_is_refused_by_name():
    w13, w2, quant = quantize_experts(
        torch.randn(1, 192, 64), torch.randn(1, 64, 96), "fp8_w8a8", weight_scale="block", block_shape=(32, 32)
    )
    with pytest.raises(
        ValueError, match=r"tp_size: expected a divisor of I 96 into whole blocks or groups of \(32, 32"
    ):
        shard_of_experts(ExpertsWeights(w13, w2, quant=quant), 0, 2)
    with pytest.raises(ValueError, match="tp_size: expected a divisor of I 9, got 2"):
        shard_of_experts(ExpertsWeights(torch.randn(1, 18, 4), torch.randn(1, 4, 9)), 0, 2)
