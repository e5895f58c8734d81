"""What processes of real ranks do in tests: each function is called on every rank."""

import os

import torch
import torch.distributed as dist
from layers import E, I, experts_of, gate_of, tokens
from lora_tables import table_of

from moegate.impl.checks import debug_checks
from moegate.impl.experts_module import RoutedExperts
from moegate.impl.layer import MoELayer, RoutingMethod
from moegate.impl.parallel.collectives import ProcessGroup
from moegate.impl.parallel.experts import ParallelExperts
from moegate.impl.parallel.mesh import Mesh
from moegate.impl.parallel.placement import ExpertPlacement, linear_placement
from moegate.impl.parallel.ranks import connect
from moegate.impl.parallel.shards import experts_of_rank, shard_of_experts
from moegate.impl.weights import ExpertsWeights

# Columns that two, three or four ranks can share.
FULL_I = 3 * I


def shared_layer(ranks, *, placement=None, device="cpu", max_tokens=8, adapters=None, **options):
    """A layer over ranks that each have tokens of their own."""
    placement = linear_placement(E, ranks.mesh.ep_size) if placement is None else placement
    parallel = ParallelExperts(ranks, placement, max_tokens=max_tokens, **options)
    whole = experts_of(device=device)
    mine = list(placement.experts_of_rank[parallel.ep_rank])
    experts = RoutedExperts(whole.w13[mine], whole.w2[mine])
    return MoELayer(gate_of(device=device), experts, RoutingMethod(2), adapters=adapters, parallel=parallel)


def _ranks(links):
    mesh = Mesh(dp_size=links.size, ep_size=links.size)
    return links.remembered("ranks", lambda: connect(mesh))


def world_of_another_size(links):
    connect(Mesh(dp_size=links.size + 1, ep_size=links.size + 1))


def meshes_that_differ(links):
    connect(Mesh(ep_size=links.size, dp_size=links.size if links.rank else 1))


def numbers_of_tokens_that_differ(links):
    ParallelExperts(_ranks(links), linear_placement(E, links.size), max_tokens=8 + links.rank)


def placements_that_differ(links):
    held = [list(range(E // 2)), list(range(E // 2, E))]
    placement = ExpertPlacement(E, tuple(map(tuple, held[:: -1 if links.rank else 1])))
    ParallelExperts(_ranks(links), placement, max_tokens=8)


def loaded_slots_that_differ(links):
    held = linear_placement(E, links.size).experts_of_rank[links.rank]
    shared_layer(_ranks(links), adapters=table_of(held, load=1 + links.rank))


def experts_of_another_number_on_one_rank(links):
    parallel = ParallelExperts(_ranks(links), linear_placement(E, links.size), max_tokens=8)
    whole, held = experts_of(), E // 2 - links.rank
    experts = RoutedExperts(whole.w13[:held], whole.w2[:held])
    MoELayer(gate_of(), experts, RoutingMethod(2), parallel=parallel)


def more_ranks_than_experts(links):
    linear_placement(links.size - 1, links.size)


def tokens_beyond_the_agreed(links):
    layer = shared_layer(_ranks(links))
    with debug_checks():
        layer(tokens(9 if links.rank else 3))


def padded_tokens_that_differ(links):
    layer = shared_layer(_ranks(links))
    with debug_checks():
        layer(tokens(2), padded_tokens=4 + links.rank)


def a_collective_that_one_rank_leaves_out(links):
    if links.rank:
        dist.all_reduce(torch.ones(3))


def death(links):
    if links.rank == 0:
        os._exit(7)


def collectives(links, device):
    """Each collective on bytes, floats and 8-bit floats."""
    group, n = ProcessGroup("world"), links.size
    for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.float8_e4m3fn):
        x = torch.full((n, 2), links.rank + 1.0, device=device).to(dtype)
        out = torch.zeros((n * n, 2), device=device).to(dtype)
        group.all_gather(out, x).wait()
        assert out.float()[:, 0].tolist() == [float(rank + 1) for rank in range(n) for _ in range(n)]
        # Rank r sends r + 1 rows to everybody.
        sent, received = [links.rank + 1] * n, [rank + 1 for rank in range(n)]
        rows = torch.full((sum(sent), 2), float(links.rank), device=device).to(dtype)
        out = torch.zeros((sum(received), 2), device=device).to(dtype)
        group.all_to_all(out, rows, received, sent).wait()
        assert out.float()[:, 0].tolist() == [float(rank) for rank in range(n) for _ in range(rank + 1)]
        if dtype is torch.float8_e4m3fn:
            continue
        total = torch.zeros((1, 2), device=device).to(dtype)
        group.reduce_scatter(total, x).wait()
        assert total.float().tolist() == [[n * (n + 1) / 2] * 2]
        group.all_reduce(x).wait()
        assert x.float()[0, 0] == n * (n + 1) / 2


def outputs(links, device, exchange, counts, lora_ids=None, own_first=False):
    """A layer's output on every rank, of tokens 0 to sum(counts) - 1 spread over the ranks, with their adapters."""
    mesh = Mesh(dp_size=links.size, ep_size=links.size)
    ranks = links.remembered("ranks", lambda: connect(mesh))
    adapters = None
    if lora_ids is not None:
        adapters = table_of(linear_placement(E, links.size).experts_of_rank[links.rank], device=device)
    options = {"exchange": exchange, "own_first": own_first}
    layer = shared_layer(ranks, device=device, max_tokens=max(1, *counts), adapters=adapters, **options)
    start = sum(counts[: links.rank])
    mine = slice(start, start + counts[links.rank])
    ids = None if lora_ids is None else torch.tensor(lora_ids, dtype=torch.int32, device=device)[mine]
    return layer(tokens(sum(counts), device=device)[mine], ids).cpu()


def sharded_layer(ranks, *, device="cpu", max_tokens=8, rank=8, shared=None, options=None, ways=None, **given):
    """A layer whose ranks share each expert's columns of I, and both matrices of its adapters."""
    size, place = ranks.mesh.tp_size, ranks.mesh.place(ranks.rank)
    placement = linear_placement(E, ranks.mesh.ep_size)
    whole = experts_of(device=device, size=FULL_I, **(options or {}))
    held = placement.experts_of_rank[place.ep_rank]
    mine = experts_of_rank(ExpertsWeights(whole.w13, whole.w2), held)
    mine = shard_of_experts(mine, place.tp_rank, size)
    given = {"fully_sharded_over": ranks.shards} | given
    return MoELayer(
        gate_of(device=device),
        RoutedExperts(mine.w13, mine.w2),
        RoutingMethod(2),
        shared_experts=shared,
        adapters=table_of(held, size=FULL_I // size, max_rank=rank, rank=rank, device=device, **given),
        parallel=ParallelExperts(ranks, placement, max_tokens=max_tokens, **(ways or {})),
    )


def fully_sharded(links, device, mesh, lora_ids):
    """The output of `sharded_layer` on every rank, for tokens that all of a run have."""
    ranks = links.remembered(("ranks", mesh), lambda: connect(mesh))
    layer = sharded_layer(ranks, device=device)
    per_run = len(lora_ids) // mesh.dp_size
    mine = slice(mesh.dp_rank(ranks.rank) * per_run, (mesh.dp_rank(ranks.rank) + 1) * per_run)
    ids = torch.tensor(lora_ids, dtype=torch.int32, device=device)[mine]
    return layer(tokens(len(lora_ids), device=device)[mine], ids).cpu()


def replayed(links, device, counts, own_first=False):
    """All-gather captured in a CUDA graph, and replayed on other tokens than it was captured with."""
    ranks = links.remembered("ranks", lambda: connect(Mesh(dp_size=links.size, ep_size=links.size)))
    layer = shared_layer(ranks, device=device, max_tokens=max(1, *counts), own_first=own_first)
    layer.prepare((counts[links.rank],))
    start = sum(counts[: links.rank])
    x = tokens(sum(counts), device=device)[start : start + counts[links.rank]]
    held, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        output = layer(held)
    held.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    return output.cpu()


def again_and_again(links, device, batches, own_first=False):
    """All-to-all on batch after batch, each of so many tokens on each rank: outputs, and how often a graph was used."""
    ranks = links.remembered("ranks", lambda: connect(Mesh(dp_size=links.size, ep_size=links.size)))
    most = max(max(counts) for counts in batches)
    layers = [
        shared_layer(ranks, device=device, max_tokens=most, exchange="all_to_all", own_first=own_first)
        for _ in range(2)
    ]
    graphs, replay, new_empty = 0, torch.cuda.CUDAGraph.replay, torch.Tensor.new_empty

    def counted(graph):
        nonlocal graphs
        graphs += 1
        replay(graph)

    def of_strange_ids(x, *size, **options):
        made = new_empty(x, *size, **options)
        return made.fill_(0x55) if made.dtype is torch.uint8 else made

    torch.cuda.CUDAGraph.replay, torch.Tensor.new_empty = counted, of_strange_ids
    try:
        outputs = []
        for number, counts in enumerate(batches):
            start = sum(counts[: links.rank])
            mine = tokens(sum(counts), device=device, name=f"x{number}")[start : start + counts[links.rank]]
            # Two layers in turn share the memory, as those of a model do.
            outputs += [layer(mine).cpu() for layer in layers]
        # Weights that moved leave nothing of what was captured.
        moved = layers[0]
        moved.experts.w13 = moved.experts.w13.clone()
        moved.experts.w2 = -moved.experts.w2
        outputs.append(moved(mine).cpu())
    finally:
        torch.cuda.CUDAGraph.replay, torch.Tensor.new_empty = replay, new_empty
    return outputs, graphs
