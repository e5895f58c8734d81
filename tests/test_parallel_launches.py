"""What an exchange costs the host: launches, torch operations and collectives of a call, counted."""

from collections import Counter

import pytest
import torch
from layers import E, H, experts_of, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from moegate.conformance.simulated_ranks import run_simulated
from moegate.conformance.subjects.moegate_parallel import ranks_of
from moegate.impl import replay
from moegate.impl.parallel.experts import ParallelExperts
from moegate.impl.parallel.mesh import Mesh
from moegate.impl.parallel.placement import linear_placement
from moegate.impl.path import record_path
from moegate.impl.platform import Platform

# What only names memory or takes it: nothing is enqueued.
FREE = ("view", "slice", "select", "split", "empty", "unsqueeze", "expand", "detach", "alias", "as_strided")
# What only tells the allocator which stream reads some memory.
FREE += ("record_stream",)
LAUNCHES = {
    "all_gather": {"pack_rows_kernel": 1},
    "all_to_all": {"plan_travel_kernel": 1, "pack_rows_kernel": 1, "sum_ranks_kernel": 1},
}
COLLECTIVES = {"all_gather": ["all_gather", "reduce_scatter"], "all_to_all": ["all_gather", "all_to_all", "all_to_all"]}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_TRITON = Platform.of(DEVICE).runs_triton


class Operations(TorchDispatchMode):
    """Counts what is not free."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if not name.startswith((*FREE, "new_empty")):
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not RUNS_TRITON, reason="without Triton an exchange is made of torch operations")
@pytest.mark.parametrize("own_first", [False, True])
@pytest.mark.parametrize("exchange", LAUNCHES)
def test_an_exchange_is_a_few_launches_and_no_torch_operation(exchange, own_first):
    counted, paths, calls = [], [], []
    replay.forget()  # an interpreted replay makes views of its own

    def body(rank, links):
        parallel = ParallelExperts(
            ranks_of(Mesh(dp_size=2, ep_size=2), links, DEVICE),
            linear_placement(E, 2),
            max_tokens=4,
            exchange=exchange,
            own_first=own_first,
        )
        experts = experts_of(num_experts=E // 2).to(DEVICE)
        parallel.join(experts, E, 2)
        ids = torch.tensor([[0, 7], [3, 1], [6, 2]], dtype=torch.int32, device=DEVICE)
        weights = torch.rand(3, 2, device=DEVICE)
        partial = torch.zeros((8, H), dtype=torch.bfloat16, device=DEVICE)
        # The experts, which other tests count, give anything here.
        parallel.partial_sums = lambda received, *arguments: partial[: received.tokens.num_tokens]
        x = tokens(3, device=DEVICE)
        if rank:  # whom the simulation lets do the collectives
            parallel.run(x, experts, lambda _: (weights, ids), None)
            return
        with record_path() as path, Operations() as operations:
            parallel.run(x, experts, lambda _: (weights, ids), None)
        counted.append(dict(operations.counted))
        paths.append(dict(path.launches))
        calls.append([entry[0] for entry in path.all("collective")])

    errors = [outcome.error for outcome in run_simulated(2, body)]
    assert errors == [None, None]
    assert paths == [LAUNCHES[exchange]]
    assert calls == [COLLECTIVES[exchange]]
    # The numbers of rows that the host waits for.
    host = {"copy_": 1} if exchange == "all_to_all" and DEVICE == "cuda" else {}
    assert counted == [host]
