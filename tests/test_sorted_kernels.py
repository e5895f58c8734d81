"""The kernels that a layer takes on Hopper alone, against those that it takes everywhere, on small shapes."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_same_rounding

from moegate.impl.config import Activation, ActivationFunction
from moegate.impl.kernels.activation import activate
from moegate.impl.kernels.align import align
from moegate.impl.kernels.combine import combine
from moegate.impl.kernels.gated_gemm import SortedTile, gated_gemm
from moegate.impl.kernels.grouped_gemm import grouped_gemm
from moegate.impl.kernels.quantize import Rows
from moegate.impl.kernels.sorted_gemm import sorted_gemm
from moegate.impl.kernels.stream_rows import StreamTile, down_rows, gate_up_rows
from moegate.impl.kernels.tile import gemm_operands
from moegate.impl.platform import Platform
from moegate.impl.tuning.kernel_config import KernelConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case:
    """A layer's operands, and what the general kernels make of them."""

    def __init__(self, m, e, top_k, h, i, *, activation="silu", interleaved=False, bias=False, on_input=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, std=1.0, dtype=torch.bfloat16):
            return (torch.empty(shape).normal_(generator=generator) * std).to(dtype).to(DEVICE)

        self.function = ActivationFunction(Activation(activation), interleaved=interleaved)
        rows = self.function.rows_a_column * i
        self.x, self.w13, self.w2 = normal(m, h), normal(e, rows, h, std=h**-0.5), normal(e, h, i, std=i**-0.5)
        self.b13, self.b2 = (normal(e, rows), normal(e, h)) if bias else (None, None)
        self.ids = torch.stack([torch.randperm(e, generator=generator)[:top_k] for _ in range(m)]).int().to(DEVICE)
        self.weights = torch.rand(m, top_k, generator=generator).to(DEVICE)
        self.on_input = on_input
        self.m, self.e, self.top_k, self.h, self.i = m, e, top_k, h, i

    def expected(self):
        """The rows of pairs after the activation and after the second GEMM, and the sum."""
        config = KernelConfig(16, 32, 32, 1, 4, 1)
        slots, experts, _ = align(self.ids, 16, self.e, self.e, None)
        routing = {
            "topk_ids": self.ids,
            "topk_weights": self.weights,
            "sorted_token_ids": slots,
            "expert_ids": experts,
            "allow_tf32": False,
            "config": config,
        }
        pairs = self.ids.numel()
        platform = Platform.of(DEVICE)
        gate_up = self.x.new_empty(pairs, self.w13.shape[1])
        grouped_gemm(
            gate_up,
            self.x,
            gemm_operands(self.w13, self.b13),
            mul_weight=self.on_input,
            a_row_is_token=True,
            **routing,
        )
        hidden, y = self.x.new_empty(pairs, self.i), self.x.new_empty(pairs, self.h)
        rows = Rows("pairs", pairs, topk_ids=self.ids, num_experts=self.e, num_local_experts=self.e)
        activate(hidden, gate_up, self.function, rows, platform)
        operands = gemm_operands(self.w2, self.b2)
        grouped_gemm(y, hidden, operands, mul_weight=not self.on_input, a_row_is_token=False, **routing)
        out = torch.empty_like(self.x)
        combine(out, y, self.ids, None, self.e, self.e, platform)
        return hidden, y, out


CASES = {
    "plain": {},
    "interleaved": {"interleaved": True, "activation": "swigluoai", "bias": True},
    "biases": {"bias": True, "on_input": True},
    "not_gated": {"activation": "relu2_no_mul", "bias": True},
}
TILES = {
    "rows": (SortedTile(32, 32, 32), SortedTile(32, 32, 32)),
    "swapped": (SortedTile(16, 32, 32, 2, swap_ab=True), SortedTile(16, 32, 64, 2, swap_ab=True)),
    "half": (SortedTile(32, 32, 64, half=True), SortedTile(32, 64, 32, half=True)),
    "persistent": (SortedTile(32, 32, 32, half=True, programs=3), SortedTile(32, 32, 32, programs=5, half=True)),
    "tma_store": (SortedTile(32, 32, 32, tma_store=True), SortedTile(32, 32, 32, programs=4, tma_store=True)),
}


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(64, 32), (72, 40)])
def test_sorted_rows_give_what_the_general_kernels_give(case, tiles, sizes):
    layer = Case(13, 5, 2, *sizes, **CASES[case])
    hidden, y, _ = layer.expected()
    first, second = TILES[tiles]
    block = first.block_size_m
    slots, experts, used = align(layer.ids, block, layer.e, layer.e, None)
    routing = {"topk_weights": layer.weights, "slots": slots, "expert_ids": experts, "used_slots": used}
    h = layer.x.new_full((slots.numel(), layer.i), float("nan"))
    gated_gemm(h, layer.x, layer.w13, layer.b13, layer.function, mul_weight=layer.on_input, tile=first, **routing)
    real = slots < layer.ids.numel()
    real[int(used) :] = False
    assert_same_rounding(h[real], hidden[slots[real].long()], "h")
    h[real] = hidden[slots[real].long()]
    is_sorted = second.tma_store
    got = layer.x.new_full((slots.numel() if is_sorted else layer.ids.numel(), layer.h), float("nan"))
    options = {"is_sorted": is_sorted, "mul_weight": not layer.on_input, "tile": second}
    sorted_gemm(got, h, layer.w2, layer.b2, **options, **routing)
    assert_same_rounding(got[real] if is_sorted else got[slots[real].long()], y[slots[real].long()], "y")
    assert is_sorted or not got.isnan().any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(64, 32), (72, 40)])
@pytest.mark.parametrize("stages", [1, 2])
def test_streamed_rows_give_what_the_general_kernels_give(case, sizes, stages):
    layer = Case(3, 9, 3, *sizes, **CASES[case])
    hidden, _, out = layer.expected()
    routing = {"topk_ids": layer.ids, "topk_weights": layer.weights, "expert_map": None, "num_experts": layer.e}
    h = torch.full_like(hidden, float("nan"))
    tile = StreamTile(16, 64, stages)
    gate_up_rows(h, layer.x, layer.w13, layer.b13, layer.function, mul_weight=layer.on_input, tile=tile, **routing)
    assert_same_rounding(h, hidden, "h")
    got = torch.full_like(out, float("nan"))
    down_rows(got, hidden, layer.w2, layer.b2, mul_weight=not layer.on_input, tile=tile, **routing)
    assert_same_rounding(got, out, "out")
