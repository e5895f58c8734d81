"""Faults of adapters on experts, planted one at a time: each is caught by its property."""

import pytest
from planted import Fault, expect_caught

EXPAND = "kernels/lora_expand.py"
ROWS = "kernels/lora_rows.py"
LORA = ("test_lora.py",)

FAULTS = (
    Fault(
        "minus-one-is-slot-0",
        ROWS,
        "    return tl.where(rank > 0, slot, -1)\n",
        "    return tl.where(rank > 0, slot, tl.where(real, 0, -1))\n",
        LORA,
        ("LORA-01", "LORA-02", "LORA-03"),
    ),
    Fault(
        "global-expert-for-local",
        "lora/table.py",
        "            local = self._local.get(expert)\n",
        "            local = expert if expert < self.num_local_experts else None\n",
        LORA,
        ("LORA-02", "LORA-07"),
    ),
    Fault("scale-lost", EXPAND, "delta = scale * _delta(", "delta = 1.0 * _delta(", LORA, ("LORA-02",)),
    Fault(
        "ids-of-an-earlier-batch",
        "experts/triton.py",
        "                call.lora.lora_ids,\n",
        "                globals().setdefault('_kept', {}).setdefault(num_tokens, call.lora.lora_ids.clone()),\n",
        LORA,
        ("LORA-01", "LORA-02", "LORA-06", "LORA-11"),
    ),
    Fault(
        "tail-of-a-rank-read",
        EXPAND,
        "        b_mask = (columns < N)[:, None] & live[None, :]\n",
        "        b_mask = (columns < N)[:, None] & (live | True)[None, :]\n",
        LORA,
        ("LORA-02", "LORA-09", "LORA-10"),
    ),
    Fault(
        "first-adapter-of-a-block-alone",
        EXPAND,
        "        slot = next_slot(slots, slot)\n",
        "        slot = next_slot(slots, NOBODY)\n",
        LORA,
        ("LORA-02",),
    ),
    Fault(
        "adapter-of-another-token",
        "kernels/grouped_gemm.py",
        "        token = (pairs // top_k).to(tl.int64)\n",
        "        token = (pairs % top_k).to(tl.int64)\n",
        LORA,
        ("LORA-01", "LORA-02"),
    ),
    Fault(
        "added-to-rows-of-others",
        EXPAND,
        "            takes = mine[:, None] & (rank > 0)\n",
        "            takes = (mine | True)[:, None] & (rank > 0)\n",
        LORA,
        ("LORA-01", "LORA-03"),
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_planted_fault_of_adapters_is_caught_by_its_property(fault, tmp_path):
    expect_caught(fault, tmp_path)
