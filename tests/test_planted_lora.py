"""Faults of adapters on experts, planted one at a time: each is caught by its property."""

import pytest
from planted import Fault, expect_caught

EXPAND = "kernels/lora_expand.py"
SHRINK = "kernels/lora_shrink.py"
LORA = ("test_lora.py",)

FAULTS = (
    Fault(
        "minus-one-is-slot-0",
        SHRINK,
        "known_slot(tl.load(lora_ids_ptr + token, mask=real, other=-1), num_slots)",
        "tl.where(real, tl.maximum(tl.load(lora_ids_ptr + token, mask=real, other=-1), 0), -1)",
        LORA,
        ("LORA-01", "LORA-02", "LORA-03", "LORA-05"),
    ),
    Fault(
        "global-expert-for-local",
        "lora/table.py",
        "            local = self._local.get(expert)\n",
        "            local = expert if expert < self.num_local_experts else None\n",
        LORA,
        ("LORA-02", "LORA-07"),
    ),
    Fault("scale-lost", SHRINK, "acc * scale[None, :], 0.0)", "acc, 0.0)", LORA, ("LORA-02", "LORA-05")),
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
        SHRINK,
        "tl.where((n % R < rank)[None, :], acc",
        "tl.where((n % R < rank + R)[None, :], acc",
        LORA,
        ("LORA-02", "LORA-09", "LORA-10", "LORA-05"),
    ),
    Fault(
        "first-adapter-of-a-block-alone",
        "kernels/lora_rows.py",
        "    tl.store(first, count, mask=store)\n",
        "    tl.store(first, tl.minimum(count, 1), mask=store)\n",
        LORA,
        ("LORA-02", "LORA-05"),
    ),
    Fault(
        "adapter-of-another-token",
        SHRINK,
        "token = (rows // top_k)",
        "token = (rows % top_k)",
        LORA,
        ("LORA-01", "LORA-02", "LORA-05"),
    ),
    Fault(
        "added-to-rows-of-others",
        EXPAND,
        "slots[:, None] == slot[None, :]",
        "(slots[:, None] >= 0) & (slot[None, :] >= 0)",
        LORA,
        ("LORA-01", "LORA-02", "LORA-03"),
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_planted_fault_of_adapters_is_caught_by_its_property(fault, tmp_path):
    expect_caught(fault, tmp_path)
