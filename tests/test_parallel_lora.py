"""Adapters of a layer that simulated ranks share: what EP does not say of them, and what is refused by name."""

import pytest
import torch
from closeness import assert_same_sum
from layers import E, H, I, layer_of, tokens
from lora_tables import adapter_of, table_of
from rank_bodies import shared_layer

from moegate.conformance.simulated_ranks import run_simulated
from moegate.conformance.subjects.moegate_parallel import ranks_of
from moegate.impl.checks import debug_checks
from moegate.impl.lora.adapter import Adapter, LowRank
from moegate.impl.parallel.adapters import adapter_facts
from moegate.impl.parallel.mesh import Mesh
from moegate.impl.parallel.shards import shard_of_adapter

TWO = Mesh(dp_size=2, ep_size=2)
HALVES = (tuple(range(E // 2)), tuple(range(E // 2, E)))


def errors_of(body, mesh=TWO):
    return [o.error for o in run_simulated(mesh.world_size, lambda rank, links: body(ranks_of(mesh, links)))]


def results_of(body, mesh=TWO):
    outcomes = run_simulated(mesh.world_size, lambda rank, links: body(ranks_of(mesh, links)))
    assert [outcome.error for outcome in outcomes] == [None] * mesh.world_size
    return [outcome.result for outcome in outcomes]


def held(ranks, **options):
    """The layer of a rank with a table of its experts, options of the table by name."""
    return shared_layer(ranks, adapters=table_of(HALVES[ranks.rank], **options))


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_tokens_without_ids_meet_tokens_with_them(exchange):
    x, ids = tokens(6), torch.tensor([0, -1, 1], dtype=torch.int32)
    whole = layer_of(shared=False, adapters=table_of(range(E)))
    expected = whole(x, torch.cat([torch.full((3,), -1, dtype=torch.int32), ids]))

    def body(ranks):
        layer = shared_layer(ranks, exchange=exchange, adapters=table_of(HALVES[ranks.rank]))
        return layer(x[3 * ranks.rank :][:3], ids if ranks.rank else None)

    output = torch.cat(results_of(body))
    assert_same_sum(output, expected)
    assert not torch.allclose(output, layer_of(shared=False)(x), rtol=2**-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"num_slots": 3},
            "adapters: expected the same on every rank, got ['2 slots of ranks up to 8', '3 slots of ranks up to 8']",
        ),
        ({"max_rank": 16}, "'2 slots of ranks up to 8', '2 slots of ranks up to 16'"),
        ({"load": 1}, "loaded slots of adapters: expected the same on every rank, got ['0-1', '0']"),
        ({"experts": HALVES[0]}, "rank 1: adapters: expected a table of the placement's experts [4, 5, 6, 7]"),
        ({"size": 2 * I}, "rank 1: adapters: expected a table with I 32, got 64"),
        ({"num_experts": E + 1}, "rank 1: adapters: expected a table of 8 experts, got 9"),
    ],
)
def test_tables_that_disagree_raise_the_same_error_on_every_rank(options, text):
    def body(ranks):
        given = {"experts": HALVES[ranks.rank], **(options if ranks.rank else {})}
        shared_layer(ranks, adapters=table_of(**given))

    errors = errors_of(body)
    assert [type(error) for error in errors] == [ValueError, ValueError]
    assert str(errors[0]) == str(errors[1])
    assert text in str(errors[0])


def test_a_table_on_one_rank_alone_raises_on_every_rank():
    errors = errors_of(lambda ranks: held(ranks) if ranks.rank else shared_layer(ranks))
    assert str(errors[0]) == str(errors[1])
    assert "adapters: expected the same on every rank, got ['None', '2 slots" in str(errors[0])


def test_a_table_that_is_none_is_refused_on_every_rank():
    errors = errors_of(lambda ranks: shared_layer(ranks, adapters="lora" if ranks.rank else table_of(HALVES[0])))
    assert [type(error) for error in errors] == [TypeError, TypeError]
    assert str(errors[0]) == str(errors[1]) == "rank 1: adapters: expected AdapterTable or None, got str 'lora'"


@pytest.mark.parametrize(
    ("change", "ids", "text"),
    [
        (lambda table: table.evict(1), [0, -1], "loaded slots of adapters: expected the same on every rank, got"),
        (lambda table: None, [0, 2], "rank 1: lora_ids: expected -1 or a loaded slot of [0, 1], got 2"),
        (lambda table: None, [0], "rank 1: lora_ids: expected shape [2], got [1]"),
    ],
)
def test_in_debug_mode_what_one_rank_gets_wrong_raises_on_every_rank(change, ids, text):
    def body(ranks):
        layer = held(ranks)
        if ranks.rank:
            change(layer.adapters)
        layer(tokens(2), torch.tensor(ids if ranks.rank else [-1, -1], dtype=torch.int32))

    with debug_checks():
        errors = errors_of(body)
    assert str(errors[0]) == str(errors[1])
    assert text in str(errors[0])


def test_ids_without_adapters_are_refused_on_every_rank():
    def body(ranks):
        shared_layer(ranks)(tokens(2), torch.zeros(2, dtype=torch.int32) if ranks.rank else None)

    with debug_checks():
        errors = errors_of(body)
    assert [str(error) for error in errors] == ["rank 1: lora_ids: expected None without adapters, got ids"] * 2


def test_the_slots_of_a_large_table_are_told_in_few_bytes():
    table = table_of((), num_slots=1024, load=0)
    for slot in range(0, 1024, 2):
        table.load(Adapter(), slot)
    before = adapter_facts(table)["loaded slots of adapters"]
    table.evict(1022)
    after = adapter_facts(table)["loaded slots of adapters"]
    assert len(before) < 256
    assert before != after


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shares_a", [False, True])
def test_shards_of_an_adapter_are_the_rows_and_columns_of_the_layer_s_shards(interleaved, shares_a):
    whole = adapter_of(0, shares_a=shares_a)
    parts = [shard_of_adapter(whole, rank, 2, interleaved=interleaved) for rank in range(2)]
    for rank, part in enumerate(parts):
        columns = slice(I // 2 * rank, I // 2 * rank + I // 2)
        assert torch.equal(part.down[3].a, whole.down[3].a[:, columns])
        assert torch.equal(part.down[3].b, whole.down[3].b)
        if not shares_a:
            assert torch.equal(part.up[3].b, whole.up[3].b[columns])
            continue
        rows = whole.gate_up[3].b
        expected = rows[I * rank : I * rank + I] if interleaved else rows.unflatten(0, (2, I))[:, columns].flatten(0, 1)
        assert torch.equal(part.gate_up[3].b, expected)
        assert torch.equal(part.gate_up[3].a, whole.gate_up[3].a)


def test_an_adapter_that_is_none_or_cannot_be_cut_is_refused_by_name():
    with pytest.raises(TypeError, match="adapter: expected an Adapter, got dict"):
        shard_of_adapter({}, 0, 2)
    with pytest.raises(ValueError, match=r"tp_size: expected a divisor of I 32 of adapter.gate\[0\], got 3"):
        shard_of_adapter(adapter_of(0), 0, 3)
    odd = Adapter(down={1: LowRank(torch.zeros(2, 9), torch.zeros(H, 2))})
    with pytest.raises(ValueError, match=r"tp_size: expected a divisor of I 9 of adapter.down\[1\], got 2"):
        shard_of_adapter(odd, 0, 2)
