"""Adapters on a GPU: bits of base rows on real layers, graphs replayed with other adapters, many adapters and groups.

`python -m pytest tests/test_lora_gpu.py -q`
"""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch

from moegate.bench.adapters import full_table
from moegate.bench.lora import LoraContender
from moegate.bench.operands import Operands, WeightBank, make_operands
from moegate.bench.workloads import MODELS, LoraOptions, Model, Workload
from moegate.impl.batched import batched_experts
from moegate.impl.fused_moe import fused_experts
from moegate.impl.lora.adapter import Adapter, LowRank
from moegate.impl.lora.table import AdapterTable
from moegate.impl.quantization import ExpertsQuantization, QuantScheme, WeightScale
from moegate.impl.quantize import quantize_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = torch.device("cuda")
QWEN3 = MODELS["qwen3-30b-a3b"]
SMALL = Model("small", 64, 4, 512, 256, "none")


@pytest.fixture(scope="module")
def qwen3() -> tuple[WeightBank, AdapterTable]:
    workload = Workload(QWEN3, 1)
    return (
        WeightBank(QWEN3, workload.format, DEVICE),
        full_table(QWEN3, LoraOptions(16, 8), torch.bfloat16, DEVICE),
    )


def call(operands: Operands, table: AdapterTable | None, ids: torch.Tensor | None) -> torch.Tensor:
    return operands.pass_to(partial(fused_experts, adapters=table, lora_ids=ids))


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 64, 256, 512, 1024, 4096])
def test_a_real_layer_is_right_and_its_base_rows_keep_their_bits(qwen3, num_tokens: int) -> None:
    bank, table = qwen3
    operands = make_operands(Workload(QWEN3, num_tokens), bank, 0, 0)
    alone = call(operands, None, None)
    for ids in (
        torch.arange(num_tokens) % 9 - 1,
        torch.arange(num_tokens) % 8,
        torch.full((num_tokens,), -1),
    ):
        ids = ids.to(DEVICE, torch.int32)
        contender = LoraContender(table, ids)
        verdict = contender.judge(contender, operands)
        assert verdict.holds, verdict
        out, none = call(operands, table, ids), ids < 0
        assert torch.equal(out[none].view(torch.int16), alone[none].view(torch.int16))
        assert torch.equal(out, call(operands, table, ids))


@pytest.mark.parametrize(("dtype", "num_tokens"), product([torch.float16, torch.float32], [2, 40, 700]))
def test_other_dtypes_are_right_and_their_base_rows_keep_their_bits(dtype: torch.dtype, num_tokens: int) -> None:
    workload = Workload(SMALL, num_tokens, dtype={torch.float16: "fp16", torch.float32: "fp32"}[dtype])
    operands = make_operands(workload, WeightBank(SMALL, workload.format, DEVICE), 0, 0)
    table = full_table(SMALL, LoraOptions(40, 5), dtype, DEVICE)
    ids = (torch.arange(num_tokens, device=DEVICE) % 6 - 1).int()
    contender = LoraContender(table, ids)
    assert contender.judge(contender, operands).holds
    none = ids < 0
    assert torch.equal(call(operands, table, ids)[none], call(operands, None, None)[none])


@pytest.mark.parametrize(("scheme", "num_tokens"), product(["fp8-block", "int4-g128"], [1, 64, 600]))
def test_base_rows_of_quantised_layers_keep_their_bits(scheme: str, num_tokens: int) -> None:
    workload = Workload(SMALL, num_tokens, dtype=scheme)
    operands = make_operands(workload, WeightBank(SMALL, workload.format, DEVICE), 0, 0)
    table = full_table(SMALL, LoraOptions(16, 5), torch.bfloat16, DEVICE)
    ids = (torch.arange(num_tokens, device=DEVICE) % 6 - 1).int()
    out, alone, none = call(operands, table, ids), call(operands, None, None), ids < 0
    assert torch.equal(out[none].view(torch.int16), alone[none].view(torch.int16))
    assert num_tokens == 1 or (out[~none] != alone[~none]).any(dim=1).all()


def test_the_batched_format_keeps_the_bits_of_base_rows() -> None:
    experts, most, h, i = 16, 200, 512, 256
    generator = torch.Generator(DEVICE).manual_seed(1)
    x, w13, w2 = (
        torch.randn(s, generator=generator, device=DEVICE, dtype=torch.bfloat16) / 16
        for s in ((experts, most, h), (experts, 2 * i, h), (experts, h, i))
    )
    model = Model("slabs", experts, 1, h, i, "none")
    table = full_table(model, LoraOptions(32, 7), torch.bfloat16, DEVICE)
    counts = torch.randint(0, most + 1, (experts,), device=DEVICE, dtype=torch.int32)
    ids = (torch.arange(experts * most, device=DEVICE) % 8 - 1).int().view(experts, most)
    scales = quantize_weights(
        w13, QuantScheme.FP8_W8A8, weight_scale=WeightScale.BLOCK, block_shape=(128, 128), parts=2
    )
    scales2 = quantize_weights(w2, QuantScheme.FP8_W8A8, weight_scale=WeightScale.BLOCK, block_shape=(128, 128))
    quant = ExpertsQuantization(QuantScheme.FP8_W8A8, scales[1], scales2[1], block_shape=(128, 128))
    for weights in ((w13, w2, None), (scales[0], scales2[0], quant)):
        run = partial(batched_experts, x, *weights[:2], counts, quant=weights[2])
        out, alone = run(adapters=table, lora_ids=ids), run()
        held = torch.arange(most, device=DEVICE)[None, :] < counts[:, None]
        none = (ids < 0) & held
        assert torch.equal(out[none].view(torch.int16), alone[none].view(torch.int16))
        assert (out[(ids >= 0) & held] != alone[(ids >= 0) & held]).any(dim=-1).all()


@pytest.mark.parametrize("num_tokens", [1, 8, 300])
def test_a_captured_graph_sees_other_ids_and_adapters(num_tokens: int) -> None:
    workload = Workload(SMALL, num_tokens)
    operands = make_operands(workload, WeightBank(SMALL, workload.format, DEVICE), 0, 0)
    table = full_table(SMALL, LoraOptions(16, 4), torch.bfloat16, DEVICE)
    spare = full_table(SMALL, LoraOptions(8, 4), torch.bfloat16, DEVICE)
    adapters = [held.adapter_of(slot) for held in (table, spare) for slot in range(4)]
    ids = torch.full((num_tokens,), -1, dtype=torch.int32, device=DEVICE)
    call(operands, table, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(operands, table, ids)
    for turn in range(12):
        if turn % 3 == 1:
            adapter = adapters[turn % len(adapters)]
            assert adapter is not None
            table.load(adapter, turn % 4)
        if turn % 3 == 2:
            table.evict(table.loaded[0])
        held = torch.tensor([-1, *table.loaded], device=DEVICE, dtype=torch.int32)
        ids.copy_(held[(torch.arange(num_tokens, device=DEVICE) + turn) % len(held)])
        operands.topk_ids.copy_(operands.topk_ids.roll(1, 0).add(turn) % SMALL.num_experts)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, call(operands, table, ids)), turn


def test_64_adapters_on_128_experts_are_8192_groups() -> None:
    model = Model("many", 128, 8, 256, 128, "none")
    workload = Workload(model, 2048)
    operands = make_operands(workload, WeightBank(model, workload.format, DEVICE), 0, 0)
    table = full_table(model, LoraOptions(8, 64), torch.bfloat16, DEVICE)
    ids = (torch.arange(2048, device=DEVICE) % 65 - 1).int()
    contender = LoraContender(table, ids)
    assert contender.judge(contender, operands).holds
    none = ids < 0
    assert torch.equal(call(operands, table, ids)[none], call(operands, None, None)[none])


def test_an_adapter_that_overflows_reaches_its_own_tokens_alone(qwen3) -> None:
    bank, table = qwen3
    operands = make_operands(Workload(QWEN3, 700), bank, 0, 0)
    ids = (torch.arange(700, device=DEVICE) % 9 - 1).int()
    before = call(operands, table, ids)
    most = partial(torch.full, fill_value=torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16, device=DEVICE)
    h, i = QWEN3.hidden_size, QWEN3.intermediate_size
    held = table.adapter_of(3)
    assert held is not None
    table.load(Adapter(down={e: LowRank(most((16, i)), most((h, 16))) for e in range(128)}), 3)
    after = call(operands, table, ids)
    table.load(held, 3)
    others = ids != 3
    assert torch.equal(before[others], after[others])
    assert not after[~others].isfinite().any()
