"""GEMMs of sorted rows in fp8 with scales of blocks, against those that a layer takes elsewhere, on small shapes."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_same_rounding

from moegate.impl.config import Activation, ActivationFunction, QuantScheme
from moegate.impl.kernels.activation import activate_and_quantize
from moegate.impl.kernels.align import align
from moegate.impl.kernels.block_scaled_gemm import ScaledTile, scaled_gated_gemm, scaled_sorted_gemm
from moegate.impl.kernels.grouped_gemm import grouped_gemm
from moegate.impl.kernels.quantize import Rows, quantize_rows
from moegate.impl.kernels.tile import gemm_operands
from moegate.impl.quantization import ActivationScale, ExpertsQuantization
from moegate.impl.tuning.kernel_config import KernelConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8 = torch.float8_e4m3fn
# Of the matrix instruction of Hopper, which sums fp8 in another way than those for fewer than 64 rows.
BLOCK, ROWS = (128, 128) if torch.cuda.is_available() else (32, 32)
M, E, TOP_K = 37, 5, 2


class Case:
    """A layer's operands, and what the general kernels make of them."""

    def __init__(self, h, i, *, activation="silu", bias=False, on_input=False):
        generator = torch.Generator().manual_seed(1)

        def normal(*shape, std=1.0, dtype=torch.bfloat16):
            return (torch.empty(shape).normal_(generator=generator) * std).to(dtype).to(DEVICE)

        def scales(*shape):
            return torch.exp2(torch.randint(-3, 4, shape, generator=generator).float()).to(DEVICE)

        self.function, self.on_input = ActivationFunction(Activation(activation)), on_input
        self.x, self.w13, self.w2 = normal(M, h), normal(E, 2 * i, h, dtype=FP8), normal(E, h, i, dtype=FP8)
        groups, steps = -(-i // BLOCK), -(-h // BLOCK)
        self.s13, self.s2 = scales(E, 2 * groups, steps) * h**-0.5, scales(E, steps, groups) * i**-0.5
        self.b13, self.b2 = (normal(E, 2 * i), normal(E, h)) if bias else (None, None)
        self.ids = torch.stack([torch.randperm(E, generator=generator)[:TOP_K] for _ in range(M)]).int().to(DEVICE)
        self.weights = torch.rand(M, TOP_K, generator=generator).to(DEVICE)
        self.h, self.i = h, i
        self.q, self.q_scale = quantize_rows(self.x, FP8, ActivationScale.GROUP, BLOCK)

    def expected(self):
        """The quantised rows of pairs with their scales, and what the second GEMM makes of them."""
        config = KernelConfig(16, 32, 32, 1, 4, 1) if BLOCK == 32 else KernelConfig(64, 128, 128, 1, 4, 3)
        slots, experts, _ = align(self.ids, config.block_size_m, E, E, None)
        quant = ExpertsQuantization(QuantScheme.FP8_W8A8, self.s13, self.s2, block_shape=(BLOCK, BLOCK))
        routing = {"topk_ids": self.ids, "topk_weights": self.weights, "sorted_token_ids": slots}
        routing |= {"expert_ids": experts, "allow_tf32": False, "config": config}
        gate_up = self.x.new_empty(M * TOP_K, 2 * self.i)
        operands = gemm_operands(self.w13, self.b13, quant, parts=2, a_scale=self.q_scale)
        grouped_gemm(gate_up, self.q, operands, mul_weight=self.on_input, a_row_is_token=True, **routing)
        hidden = torch.empty((M * TOP_K, self.i), dtype=FP8, device=DEVICE)
        rows = Rows("pairs", M * TOP_K, topk_ids=self.ids, num_experts=E, num_local_experts=E)
        scale = activate_and_quantize(hidden, gate_up, self.function, ActivationScale.GROUP, BLOCK, None, rows)
        y = self.x.new_empty(M * TOP_K, self.h)
        operands = gemm_operands(self.w2, self.b2, quant, is_w13=False, a_scale=scale)
        grouped_gemm(y, hidden, operands, mul_weight=not self.on_input, a_row_is_token=False, **routing)
        return hidden, scale, y


CASES = {
    "plain": {},
    "biases": {"bias": True, "on_input": True},
    "swigluoai": {"activation": "swigluoai", "bias": True},
}


@pytest.mark.parametrize("group_size_m", [1, 3, 8])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(2, 1), (3.5, 1.5), (0.5, 0.5)])
def test_block_scaled_rows_give_what_the_general_kernels_give(case, group_size_m, sizes):
    layer = Case(*(int(size * BLOCK) for size in sizes), **CASES[case])
    hidden, scale, y = layer.expected()
    tile = ScaledTile(ROWS, group_size_m=group_size_m)
    slots, experts, used = align(layer.ids, ROWS, E, E, None)
    routing = {"topk_weights": layer.weights, "slots": slots, "expert_ids": experts, "block_shape": (BLOCK, BLOCK)}
    h = torch.full((slots.numel(), layer.i), float("nan"), device=DEVICE).to(FP8)
    h_scale = torch.full((slots.numel(), scale.shape[1]), float("nan"), device=DEVICE)
    scaled_gated_gemm(
        h,
        h_scale,
        layer.q,
        layer.q_scale,
        layer.w13,
        layer.s13,
        layer.b13,
        layer.function,
        storage=torch.bfloat16,
        mul_weight=layer.on_input,
        tile=tile,
        **routing,
    )
    real = slots < layer.ids.numel()
    real[int(used) :] = False
    pairs = slots[real].long()
    assert torch.equal(h_scale[real], scale[pairs])
    assert torch.equal(h[real].float(), hidden[pairs].float())
    got = layer.x.new_full((layer.ids.numel(), layer.h), float("nan"))
    scaled_sorted_gemm(
        got, h, h_scale, layer.w2, layer.s2, layer.b2, mul_weight=not layer.on_input, tile=tile, **routing
    )
    assert_same_rounding(got, y, "y")
