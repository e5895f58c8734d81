"""The Triton backend for the batched activation format: `[E_local, max_tokens, H]` with a count for each expert."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..config import ActivationFormat, MoEConfig, QuantScheme
from ..kernels.batched_gemm import batched_gemm
from ..kernels.lora_rows import adapters_of_slabs
from ..kernels.quantize import Rows
from ..platform import Platform
from ..tuning.lookup import default_kernel_configs
from .base import BatchedCall, BatchedExperts
from .stages import (
    LayerAdapters,
    LayerWorkspace,
    activate_hidden,
    note_tiles,
    quantize_input,
    w2_operands,
    w13_operands,
)
from .triton import unfit_for_triton

_SCHEMES = (QuantScheme.NONE, QuantScheme.FP8_W8A8)


class BatchedTritonExperts(BatchedExperts):
    """GEMMs in Triton over tokens that arrive sorted by expert, as all-to-all dispatch delivers them.

    Rounding points, all to the storage dtype: the first GEMM's output, the activation's output, the second GEMM's
    output. Everything between is float32.
    """

    backend: ClassVar[str] = "batched_triton"

    @classmethod
    def refusal(cls, config: MoEConfig, platform: Platform) -> str | None:
        """Why the batched kernels cannot run `config` on `platform`; None where they can."""
        unfit = unfit_for_triton(platform)
        if unfit is not None:
            return unfit
        if config.activation_format is not ActivationFormat.BATCHED:
            return f"takes the batched activation format, got {config.activation_format}"
        if config.scheme not in _SCHEMES:
            return f"takes the schemes {', '.join(_SCHEMES)}, got {config.scheme}"
        if config.scheme is QuantScheme.FP8_W8A8 and not platform.has_fp8_e4m3:
            return f"fp8 e4m3 needs compute capability 8.9 or gfx942 and later, {platform} has none"
        return None

    def apply(self, out: torch.Tensor, call: BatchedCall) -> None:
        """Write each token through its expert; see `BatchedExperts.apply`."""
        weights, function, counts = call.weights, call.activation, call.expert_num_tokens
        num_experts, max_tokens, hidden_size = call.hidden_states.shape
        intermediate_size = weights.intermediate_size
        w13_rows = function.rows_a_column * intermediate_size
        platform = Platform.of(out.device)
        # The host knows the slabs and not the counts: tiles are chosen for slabs that are half full, which gives a
        # slab one row block where a block can hold it. Tuned files say nothing here: their keys count the tokens of a
        # layer, before dispatch has spread them.
        configs = default_kernel_configs(
            num_tokens=max_tokens,
            top_k=1,
            num_experts=2,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            dtype=out.dtype,
            platform=platform,
            scheme=weights.scheme,
            block_shape=weights.block_shape,
            is_gated=function.kind.is_gated,
        )
        note_tiles(configs)

        num_rows = num_experts * max_tokens
        slabs = Rows("slabs", num_rows, expert_num_tokens=counts, max_tokens=max_tokens)
        workspace = LayerWorkspace(out, num_rows, w13_rows, intermediate_size, hidden_size=0)
        gate_up = workspace.gate_up.view(num_experts, max_tokens, w13_rows)
        allow_tf32 = call.allow_tf32

        lora = None
        if call.lora is not None:
            rows = adapters_of_slabs(
                call.lora.lora_ids, call.lora.table.w13, counts, max_tokens, configs.w13.block_size_m
            )
            lora = LayerAdapters(call.lora.table, rows, platform, allow_tf32=allow_tf32)

        x, x_scale = quantize_input(call.hidden_states, weights, slabs)
        operands = w13_operands(weights, function, x_scale)
        shrunk = None if lora is None else lora.w13(call.hidden_states)
        batched_gemm(gate_up, x, operands, counts, allow_tf32=allow_tf32, config=configs.w13, shrunk=shrunk)
        hidden, hidden_scale = activate_hidden(
            workspace.hidden, workspace.gate_up, weights, function, slabs, platform, keep_plain=lora is not None
        )
        hidden = hidden.view(num_experts, max_tokens, intermediate_size)
        shrunk = None if lora is None else lora.w2(workspace.hidden.view(hidden.shape))
        operands = w2_operands(weights, hidden_scale)
        batched_gemm(out, hidden, operands, counts, allow_tf32=allow_tf32, config=configs.w2, shrunk=shrunk)
