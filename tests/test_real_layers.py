"""Layers of real models at their real sizes: within the derived budget, and the same bits every time. Needs a GPU.

`pytest tests/test_real_layers.py -rP` prints the budget used by each.
"""

import pytest
import torch

from moegate.bench.formats import find_format
from moegate.bench.operands import WeightBank, make_operands
from moegate.bench.verification import verify_by_budget
from moegate.bench.workloads import MODELS, Model, Workload
from moegate.conformance.verify import verify_experts
from moegate.impl.batched import batched_experts
from moegate.impl.fused_moe import fused_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="real sizes need a GPU")

LAYERS = (
    ("deepseek-v3-tp8", "fp8-block"),
    ("minimax-m2.5-ep4", "fp8-block"),
    ("qwen3.5-35b-a3b", "fp8-block"),
    ("qwen3-30b-a3b", "int4-g128"),
    ("gpt-oss-120b", "bf16"),
)
# More elements than 32 bits count in every operand and in everything between: gate_up 4.3e9, hidden 2.2e9, expert
# outputs 2.2e9, w13 5.4e9, w2 2.7e9.
VAST = Model("vast", 40, 8, 8192, 8192, "sizes beyond 2^31 elements")
VAST_TOKENS = 33_000


def free_gib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30


@pytest.fixture(scope="module")
def bank():
    """One layer's weights at a time."""
    held: dict[tuple[str, str], WeightBank] = {}

    def of(model: Model, dtype: str) -> WeightBank:
        if (model.name, dtype) not in held:
            held.clear()
            torch.cuda.empty_cache()
            held[model.name, dtype] = WeightBank(model, find_format(dtype), torch.device("cuda"))
        return held[model.name, dtype]

    yield of
    held.clear()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("tokens", [1, 7, 64, 513, 4096])
@pytest.mark.parametrize(("name", "dtype"), LAYERS)
def test_a_real_layer_is_within_budget_and_repeats_its_bits(bank, name, dtype, tokens, record_property):
    workload = Workload(MODELS[name], tokens, dtype=dtype, cache_state="warm")
    operands = make_operands(workload, bank(workload.model, dtype), 0, 0)
    verdict = verify_by_budget(fused_experts, operands)
    record_property("budget_used", verdict.budget_used)
    print(f"{name} {dtype} M={tokens}: budget used {verdict.budget_used:.3f}")
    assert verdict.holds, verdict.detail
    first, again = operands.pass_to(fused_experts), operands.pass_to(fused_experts)
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", ["bf16", "fp8-block", "int4-g128"])
def test_a_layer_beyond_32_bits_is_within_budget(bank, dtype):
    if free_gib() < 48:
        pytest.skip(f"needs 48 GiB of free GPU memory, there are {free_gib():.0f}")
    workload = Workload(VAST, VAST_TOKENS, dtype=dtype, cache_state="warm")
    operands = make_operands(workload, bank(VAST, dtype), 0, 0)
    verdict = verify_by_budget(fused_experts, operands)
    print(f"vast {dtype} M={VAST_TOKENS}: budget used {verdict.budget_used:.3f}")
    assert verdict.holds, verdict.detail


def test_slabs_beyond_32_bits_are_within_budget(bank):
    if free_gib() < 48:
        pytest.skip(f"needs 48 GiB of free GPU memory, there are {free_gib():.0f}")
    slabs, rows = 8, 34_000
    weights = make_operands(Workload(VAST, 1, dtype="bf16", cache_state="warm"), bank(VAST, "bf16"), 0, 0)
    w13, w2 = weights.w13[:slabs], weights.w2[:slabs]
    x = torch.randn(slabs, rows, VAST.hidden_size, dtype=torch.bfloat16, device="cuda")
    counts = torch.full((slabs,), rows, dtype=torch.int32, device="cuda")
    out = batched_experts(x, w13, w2, counts)
    last = slice(-16, None)
    ids = torch.arange(slabs, dtype=torch.int32, device="cuda").repeat_interleave(16)[:, None]
    verdict = verify_experts(
        out[:, last].flatten(0, 1), x[:, last].flatten(0, 1), w13, w2, torch.ones_like(ids, dtype=torch.float32), ids
    )
    print(f"vast slabs: budget used {verdict.budget_used:.3f}")
    assert verdict.holds, verdict.detail
