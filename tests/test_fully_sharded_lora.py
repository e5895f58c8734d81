"""Adapters cut in both matrices, on simulated ranks: what EP does not say, and what is refused by name."""

import copy

import pytest
import torch
from closeness import assert_same_sum
from layers import E, H, experts_of, gate_of, layer_of, shared_of, tokens
from lora_tables import adapter_of, table_of
from rank_bodies import FULL_I, sharded_layer

from moegate.conformance.simulated_ranks import DeadlockError, run_simulated
from moegate.conformance.subjects.moegate_parallel import ranks_of
from moegate.impl.checks import debug_checks
from moegate.impl.layer import MoELayer, RoutingMethod
from moegate.impl.lora.adapter import Adapter
from moegate.impl.parallel.mesh import Mesh
from moegate.impl.path import record_path
from moegate.impl.shared_experts import SharedExpertsSetting

TWO, THREE = Mesh(tp_size=2), Mesh(tp_size=3)
IDS = [0, 1, -1, 1, 0, -1]


def outcomes_of(body, mesh=TWO):
    return run_simulated(mesh.world_size, lambda rank, links: body(ranks_of(mesh, links)))


def results_of(body, mesh=TWO):
    outcomes = outcomes_of(body, mesh)
    assert [outcome.error for outcome in outcomes] == [None] * mesh.world_size
    return [outcome.result for outcome in outcomes]


def same_error_of(body, mesh=TWO):
    errors = [outcome.error for outcome in outcomes_of(body, mesh)]
    assert not any(isinstance(error, DeadlockError) for error in errors)
    assert len({(type(error), str(error)) for error in errors}) == 1
    return errors[0]


def held(layer):
    """The table of a layer that has one."""
    assert layer.adapters is not None
    return layer.adapters


def whole_layer(rank=8):
    adapters = table_of(range(E), size=FULL_I, max_rank=rank, rank=rank)
    return MoELayer(gate_of(), experts_of(size=FULL_I), RoutingMethod(2), adapters=adapters)


@pytest.mark.parametrize(
    ("mesh", "rank"),
    [(TWO, 8), (Mesh(tp_size=4), 12), (Mesh(tp_size=2, ep_size=2), 8)],
    ids=["two", "four", "two by two"],
)
def test_ranks_give_the_layer_of_one(mesh, rank):
    ids = torch.tensor(IDS, dtype=torch.int32)
    expected = whole_layer(rank)(tokens(6), ids)
    for output in results_of(lambda ranks: sharded_layer(ranks, rank=rank)(tokens(6), ids), mesh):
        assert_same_sum(output, expected)
    assert not torch.allclose(expected, whole_layer(rank)(tokens(6)), rtol=2**-6)


def test_a_rank_has_its_part_of_the_memory_of_whole_matrices():
    def numbers(table):
        return sum(stacked.a.numel() + stacked.b.numel() for stacked in (table.w13, table.w2))

    whole = numbers(table_of(range(E), size=FULL_I, max_rank=16))
    assert results_of(lambda ranks: numbers(sharded_layer(ranks, rank=16).adapters)) == [whole // 2] * 2


def test_a_slot_is_loaded_anew_and_emptied():
    def body(ranks):
        layer, ids = sharded_layer(ranks), torch.tensor(IDS, dtype=torch.int32)
        held(layer).load(adapter_of(3, rank=4, size=FULL_I), 1)
        held(layer).load(Adapter(), 0)
        changed = layer(tokens(6), ids)
        held(layer).evict(0)
        return changed, layer(tokens(6), ids)

    whole = whole_layer()
    held(whole).load(adapter_of(3, rank=4, size=FULL_I), 1)
    held(whole).evict(0)
    expected = whole(tokens(6), torch.tensor(IDS, dtype=torch.int32))
    for changed, emptied in results_of(body):
        assert torch.equal(changed, emptied)
        assert_same_sum(changed, expected)


def test_shared_experts_are_not_overlapped_and_the_reason_is_told():
    def body(ranks):
        layer = sharded_layer(ranks, shared=shared_of(), ways={"overlap": True})
        with record_path() as record:
            layer(tokens(3))
        return record.last("shared_experts_order"), record.last("shared_experts_reasons")[-1]

    for order, reason in results_of(body):
        assert order == "no_overlap"
        assert reason["causes"] == ["fully_sharded_lora"]


def test_beside_adapters_that_are_whole_shared_experts_are_overlapped():
    def body(ranks):
        with record_path() as record:
            sharded_layer(ranks, shared=shared_of(), ways={"overlap": True}, fully_sharded_over=None)(tokens(3))
        return record.last("shared_experts_order")

    assert results_of(body) == ["mk_internal_overlapped"] * 2


@pytest.mark.parametrize("mesh", [TWO, Mesh(tp_size=2, ep_size=2)], ids=["two", "two by two"])
@pytest.mark.parametrize("step", ["gate", "experts", "shared_experts"])
def test_in_debug_mode_an_error_of_one_rank_is_every_rank_s(step, mesh):
    def body(ranks):
        layer = sharded_layer(ranks, shared=shared_of())

        def fail(*arguments):
            raise ValueError(f"made to raise in {step}")

        if ranks.rank == 1:
            getattr(layer, step).register_forward_pre_hook(fail)
        layer(tokens(3), torch.zeros(3, dtype=torch.int32))

    with debug_checks():
        error = same_error_of(body, mesh)
    assert str(error) == f"rank 1: made to raise in {step}"


def test_in_debug_mode_ranks_without_experts_or_tokens_meet_the_others():
    one = Mesh(tp_size=2, ep_size=2)

    def body(ranks):
        layer = sharded_layer(ranks)
        none = layer(tokens(0), torch.zeros(0, dtype=torch.int32))
        return none.shape, layer(tokens(6), torch.tensor(IDS, dtype=torch.int32))

    with debug_checks():
        for shape, output in results_of(body, one):
            assert shape == (0, H)
            assert_same_sum(output, whole_layer()(tokens(6), torch.tensor(IDS, dtype=torch.int32)))


def test_a_copy_of_a_layer_has_slices_of_its_own_and_the_same_ranks():
    def body(ranks):
        layer = sharded_layer(ranks)
        other = copy.deepcopy(layer)
        held(layer).evict(0)
        assert held(other).shards is ranks.shards
        return held(other).loaded, held(layer).loaded

    assert results_of(body) == [((0, 1), (1,))] * 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 9}, "adapter.gate[0]: expected a rank that the 2 ranks of a fully sharded table divide, got 9"),
        ({"device": "meta"}, "fully_sharded_over: expected ranks on meta, got ranks on cpu"),
    ],
)
def test_what_cannot_be_cut_is_refused_on_every_rank(options, text):
    error = same_error_of(lambda ranks: table_of(range(E), max_rank=16, **options, fully_sharded_over=ranks.shards))
    assert isinstance(error, ValueError)
    assert str(error) == text


def test_a_hidden_size_that_ranks_do_not_divide_is_refused_on_every_rank():
    text = "hidden_size: expected a multiple of the 3 ranks, got 64"
    assert str(same_error_of(lambda ranks: table_of(range(E), fully_sharded_over=ranks.shards), THREE)) == text


def test_an_adapter_of_one_rank_s_columns_is_refused():
    def body(ranks):
        held(sharded_layer(ranks)).load(adapter_of(0, size=FULL_I // 2), 0)

    assert "adapter.gate[0].b: expected shape [96, 8], got [48, 8]" in str(same_error_of(body))


def test_a_table_of_whole_matrices_beside_sharded_ones_is_refused_on_every_rank():
    def body(ranks):
        sharded_layer(ranks, **({"fully_sharded_over": None, "load": 0} if ranks.rank else {"load": 0}))

    text = str(same_error_of(body))
    assert "adapters: expected the same on every rank, got ['2 slots of ranks up to 8, fully sharded over 2" in text


def test_a_table_of_the_ranks_of_another_mesh_is_refused_on_every_rank():
    def over_all(ranks):
        sharded_layer(ranks, fully_sharded_over=ranks.world)

    def where_experts_are_whole(ranks):
        sharded_layer(ranks, fully_sharded_over=ranks.world, load=0)

    text = "adapters: expected a table fully sharded over the layer's `ranks.shards`, 2, got one of 4 ranks of another"
    assert text in str(same_error_of(over_all, Mesh(tp_size=2, ep_size=2)))
    text = "adapters: expected a table of whole matrices, got one of 2 ranks of another mesh"
    assert text in str(same_error_of(where_experts_are_whole, Mesh(ep_size=2)))


def test_own_tokens_first_beside_a_sharded_table_is_refused_on_every_rank():
    error = same_error_of(lambda ranks: sharded_layer(ranks, ways={"own_first": True}), Mesh(tp_size=2, dp_size=2))
    assert str(error) == "rank 0: own_first: expected False beside fully sharded adapters, got True"


def test_a_layer_that_ranks_do_not_share_refuses_a_sharded_table():
    def body(ranks):
        layer_of(shared=False, adapters=table_of(range(E), fully_sharded_over=ranks.shards))

    text = "adapters: expected a table of whole matrices without parallel, got one that is fully sharded over 2 ranks"
    assert str(same_error_of(body)) == text


def test_a_sharded_table_keeps_no_whole_adapter():
    text = "slot: expected one of a table of whole adapters, got one of a fully sharded table"
    assert str(same_error_of(lambda ranks: held(sharded_layer(ranks)).adapter_of(0))) == text


def test_what_an_operator_says_of_its_adapters_stands_where_the_table_is_whole():
    layer = layer_of(setting=SharedExpertsSetting(fully_sharded_lora=True))
    assert layer.setting.fully_sharded_lora
