"""Faults of ranks that share a layer, of the kinds that have shipped in public engines: each is caught by name."""

import pytest
from planted import Fault, expect_caught

TESTS = ("test_ep.py",)
FAULTS = (
    Fault(
        "combine-adds-only-local-rows",
        "parallel/travel.py",
        "total += torch.where(of_turn[:, None] >= 0, added, 0.0)",
        "total += torch.where((of_turn[:, None] >= 0) & (total == 0), added, 0.0)",
        TESTS,
        ("EP-01",),
    ),
    Fault(
        "remote-ids-are-clamped-to-0",
        "parallel/travel.py",
        "local_ids = torch.where(there, tables.local_of[ids.clamp(min=0)], -1).to(torch.int32)",
        "local_ids = torch.where(there, tables.local_of[ids.clamp(min=0)], 0).to(torch.int32)",
        TESTS,
        ("EP-03",),
    ),
    Fault(
        "a-rank-without-tokens-skips-the-collectives",
        "parallel/all_gather.py",
        "        if peers is None:\n",
        "        if peers is None or not num_tokens:\n",
        TESTS,
        ("EP-08", "EP-09"),
    ),
    Fault(
        "shared-experts-are-added-on-every-rank",
        "parallel/experts.py",
        "        if self.shared_part is SharedPart.SHARD and not shared_is_reduced:\n",
        "        if self.ranks.replicas is not None:\n",
        TESTS,
        ("EP-01", "EP-12"),
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught_by_its_property(fault, tmp_path):
    expect_caught(fault, tmp_path, scale=0.02, keyword="cpu and simulated_ranks_make")
