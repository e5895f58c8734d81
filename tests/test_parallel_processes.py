"""Real process groups: what ranks agree on, errors that all of them raise, and a report of who waits where."""

import pytest
import torch
from closeness import assert_same_sum
from layers import E, experts_of, gate_of, layer_of, tokens
from lora_tables import table_of
from rank_bodies import FULL_I

from moegate.conformance.real_ranks import rank_processes
from moegate.conformance.simulated_ranks import DeadlockError
from moegate.impl.layer import MoELayer, RoutingMethod
from moegate.impl.parallel.mesh import Mesh


def _gpus():
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.fixture(scope="module")
def two():
    with rank_processes(2) as processes:
        yield processes


def run(processes, name, *arguments):
    return processes.run(f"rank_bodies:{name}", *arguments)


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ("world_of_another_size", ValueError, "rank 0: world size: expected the 3 ranks of tp 1, dp 3, ep 3, got 2"),
        (
            "meshes_that_differ",
            ValueError,
            "mesh: expected the same on every rank, got ['tp 1, dp 1, ep 2', 'tp 1, dp 2",
        ),
        ("numbers_of_tokens_that_differ", ValueError, "max_tokens: expected the same on every rank, got [8, 9]"),
        ("placements_that_differ", ValueError, "placement: expected the same on every rank, got ["),
        (
            "experts_of_another_number_on_one_rank",
            ValueError,
            "rank 1: experts: expected the 4 of the placement, got 3",
        ),
        ("more_ranks_than_experts", ValueError, "num_ranks: expected at most num_experts 1"),
        ("tokens_beyond_the_agreed", ValueError, "rank 1: hidden_states: expected at most 8 tokens, as agreed, got 9"),
        (
            "loaded_slots_that_differ",
            ValueError,
            "loaded slots of adapters: expected the same on every rank, got ['0', '0-1']",
        ),
        ("padded_tokens_that_differ", ValueError, "padded_tokens: expected the same on every rank, got [4, 5]"),
    ],
)
def test_every_rank_raises_the_same_error(two, body, kind, text):
    errors = [outcome.error for outcome in run(two, body)]
    assert [type(error) for error in errors] == [kind, kind]
    assert str(errors[0]) == str(errors[1])
    assert text in str(errors[0])


def test_collectives_carry_every_dtype_and_split(two):
    assert [outcome.error for outcome in run(two, "collectives", "cpu")] == [None, None]


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("counts", [(5, 3), (0, 4), (1, 0), (0, 0)])
def test_two_processes_give_the_layer_of_one(two, exchange, counts):
    expected = layer_of(shared=False)(tokens(sum(counts)))
    outcomes = run(two, "outputs", "cpu", exchange, counts)
    assert [outcome.error for outcome in outcomes] == [None, None]
    output = torch.cat([outcome.result for outcome in outcomes])
    assert_same_sum(output, expected)


@pytest.mark.parametrize("own_first", [False, True])
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_two_processes_give_the_layer_of_one_with_its_adapters(two, exchange, own_first):
    counts, ids = (5, 3), [0, 1, -1, 1, 0, -1, 1, 0]
    whole = layer_of(shared=False, adapters=table_of(range(E)))
    expected = whole(tokens(8), torch.tensor(ids, dtype=torch.int32))
    outcomes = run(two, "outputs", "cpu", exchange, counts, ids, own_first)
    assert [outcome.error for outcome in outcomes] == [None, None]
    output = torch.cat([outcome.result for outcome in outcomes])
    assert_same_sum(output, expected)


@pytest.mark.parametrize("mesh", [Mesh(tp_size=2), Mesh(tp_size=2, dp_size=2)], ids=["same tokens", "own tokens"])
def test_two_processes_give_the_layer_of_one_with_fully_sharded_adapters(two, mesh):
    ids = [0, 1, -1, 1, 0, -1]
    whole = MoELayer(gate_of(), experts_of(size=FULL_I), RoutingMethod(2), adapters=table_of(range(E), size=FULL_I))
    expected = whole(tokens(6), torch.tensor(ids, dtype=torch.int32))
    outcomes = run(two, "fully_sharded", "cpu", mesh, ids)
    assert [outcome.error for outcome in outcomes] == [None, None]
    outputs = [outcome.result for outcome in outcomes]
    output = torch.cat(outputs) if mesh.dp_size == 2 else outputs[0]
    assert_same_sum(output, expected)
    # Tokens travel as bytes: of floats there are the two small products, and the layer's own sum.
    sums = "reduce_scatter" if mesh.dp_size == 2 else "all_reduce"
    assert [c.name for c in outcomes[0].calls if "float" in c.dtype] == ["all_gather", "all_reduce", sums]


def test_who_waits_where_is_reported_in_time():
    with rank_processes(2, limit=1.5) as processes:
        first, second = run(processes, "a_collective_that_one_rank_leaves_out")
    assert first.error is None
    assert isinstance(second.error, DeadlockError)
    assert "no end within 1.5 s" in str(second.error)
    assert "rank 0 ended after 0 collectives" in str(second.error)
    assert "rank 1 in its collective 1: all_reduce of ranks [0, 1] with [3] torch.float32" in str(second.error)


def test_a_process_that_dies_is_reported():
    with rank_processes(2, limit=5.0) as processes:
        first, second = run(processes, "death")
    assert "the process of rank 0 died" in str(first.error)
    assert second.error is None


@pytest.mark.moegate_ranks
@pytest.mark.skipif(not _gpus(), reason="needs a GPU")
@pytest.mark.parametrize("own_first", [False, True])
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_nccl_gives_the_layer_of_one_on_every_gpu(exchange, own_first):
    size = _gpus()
    counts = tuple(5 - rank for rank in range(size)) if size < 5 else (3,) * size
    expected = layer_of(shared=False, device="cuda")(tokens(sum(counts), device="cuda")).cpu()
    with rank_processes(size, "nccl") as processes:
        outcomes = run(processes, "outputs", "cuda", exchange, counts, None, own_first)
        assert [outcome.error for outcome in outcomes] == [None] * size
        again = run(processes, "outputs", "cuda", exchange, counts, None, own_first)
        checked = run(processes, "collectives", "cuda")
    output = torch.cat([outcome.result for outcome in outcomes])
    assert_same_sum(output, expected)
    assert torch.equal(output, torch.cat([outcome.result for outcome in again]))
    assert [outcome.error for outcome in checked] == [None] * size


@pytest.mark.moegate_ranks
@pytest.mark.skipif(not _gpus(), reason="needs a GPU")
@pytest.mark.parametrize("own_first", [False, True])
def test_all_gather_is_captured_and_replayed_on_every_gpu(own_first):
    size = _gpus()
    counts = (4,) * (size - 1) + (1,)
    with rank_processes(size, "nccl") as processes:
        eager = run(processes, "outputs", "cuda", "all_gather", counts, None, own_first)
        replayed = run(processes, "replayed", "cuda", counts, own_first)
    assert [outcome.error for outcome in (*eager, *replayed)] == [None] * (2 * size)
    assert all(torch.equal(a.result, b.result) for a, b in zip(eager, replayed, strict=True))


def expect_all_batches(outcomes, batches, device):
    """Every rank's outputs of `again_and_again`, each batch twice and the last one with w2 negated, are right."""
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    layer = layer_of(shared=False, device=device)
    once = [layer(tokens(sum(counts), device=device, name=f"x{number}")).cpu() for number, counts in enumerate(batches)]
    expected = [output for output in once for _ in range(2)] + [-once[-1]]
    for number, output in enumerate(expected):
        assert_same_sum(torch.cat([outcome.result[0][number] for outcome in outcomes]), output)


def test_rows_that_no_token_came_for_change_nothing(two):
    # 70 tokens or fewer arrive on each rank, and are rounded up to a number that comes again.
    batches = [(40, 30), (41, 32), (0, 37), (60, 61), (33, 36)]
    expect_all_batches(run(two, "again_and_again", "cpu", batches), batches, "cpu")


@pytest.mark.moegate_ranks
@pytest.mark.skipif(_gpus() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("own_first", [False, True])
def test_an_all_to_all_is_right_call_after_call_whatever_was_captured(own_first):
    batches = [(40, 30)] * 4 + [(41, 32)] * 4 + [(0, 37)] * 3 + [(40, 30)] * 2
    with rank_processes(2, "nccl") as processes:
        outcomes = run(processes, "again_and_again", "cuda", batches, own_first)
    expect_all_batches(outcomes, batches, "cuda")
    for outcome in outcomes:
        assert (outcome.result[1] > 4) != own_first, "graphs are for rows that all come at once"
