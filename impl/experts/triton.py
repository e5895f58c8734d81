"""The Triton backend: align, quantise, GEMM, activation, GEMM, sum; or a layer in another form of its kernels."""

from __future__ import annotations

from typing import ClassVar

import torch

from .. import path
from ..align import ExpertAssignment, prepare_expert_assignment
from ..config import ActivationFormat, MoEConfig, QuantScheme
from ..kernels.combine import combine
from ..kernels.grouped_gemm import grouped_gemm
from ..kernels.lora_rows import adapters_of_pairs
from ..kernels.quantize import Rows
from ..platform import Platform, Vendor
from ..tuning.lookup import find_kernel_configs
from .base import ExpertsCall, StandardExperts
from .kernel_form import KernelForm
from .stages import (
    LayerAdapters,
    LayerWorkspace,
    activate_hidden,
    note_tiles,
    quantize_input,
    w2_operands,
    w13_operands,
)
from .triton_forms import form_of_call, run_scaled, run_sorted, run_streamed, scaled_tiles, sorted_tiles


def unfit_for_triton(platform: Platform) -> str | None:
    """Why no kernel of ours runs on `platform`, in words for the user; None where they do."""
    if platform.vendor is Vendor.CPU and not platform.interpreted:
        return "Triton runs on a CPU under its interpreter alone (TRITON_INTERPRET=1 before Python starts)"
    if not platform.runs_triton:
        return f"Triton does not run on {platform}"
    if platform.vendor is Vendor.NVIDIA and (platform.capability or (0, 0)) < (8, 0):
        return f"the kernels need compute capability 8.0, {platform} has less"
    return None


class TritonExperts(StandardExperts):
    """Grouped GEMMs in Triton.

    Rounding points, all to the storage dtype: the first GEMM's output, the activation's output, the second GEMM's
    output times the routing weight, the sum. Everything between is float32, but for what LoRA's A gives, which is
    rounded before B takes it.
    """

    backend: ClassVar[str] = "triton"

    @classmethod
    def refusal(cls, config: MoEConfig, platform: Platform) -> str | None:
        """Why Triton cannot run `config` on `platform`; None where it can."""
        unfit = unfit_for_triton(platform)
        if unfit is not None:
            return unfit
        if config.scheme is QuantScheme.FP8_W8A8 and not platform.has_fp8_e4m3:
            return f"fp8 e4m3 needs compute capability 8.9 or gfx942 and later, {platform} has none"
        if config.activation_format is not ActivationFormat.STANDARD:
            return f"takes the standard activation format, got {config.activation_format}"
        return None

    def apply(self, out: torch.Tensor, call: ExpertsCall) -> None:
        """Write the layer into `out`; see `StandardExperts.apply`."""
        platform = Platform.of(out.device)
        decision = form_of_call(call, out.dtype, platform)
        path.note("kernel_form", decision.as_dict())
        if decision.form is KernelForm.STREAMED:
            _assign(call, 1)  # in blocks of their own: nothing is launched
            run_streamed(out, call, platform)
        elif decision.form is KernelForm.SORTED and call.weights.quant is not None:
            scaled = scaled_tiles(platform)
            run_scaled(out, call, _assign(call, scaled[0].block_size_m), scaled, platform)
        elif decision.form is KernelForm.SORTED:
            tiles = sorted_tiles(call.topk_ids.numel(), call.global_num_experts, call.weights.hidden_size, platform)
            run_sorted(out, call, _assign(call, tiles[0].block_size_m), tiles, platform)
        else:
            self._run_general(out, call, platform)

    def _run_general(self, out: torch.Tensor, call: ExpertsCall, platform: Platform) -> None:
        weights, topk_ids, function = call.weights, call.topk_ids, call.activation
        num_tokens, top_k = topk_ids.shape
        num_local_experts, hidden_size = weights.num_local_experts, weights.hidden_size
        intermediate_size = weights.intermediate_size
        w13_rows = function.rows_a_column * intermediate_size
        num_pairs = num_tokens * top_k
        configs = find_kernel_configs(
            num_tokens=num_tokens,
            top_k=top_k,
            num_experts=call.global_num_experts,
            num_local_experts=num_local_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            dtype=out.dtype,
            platform=platform,
            scheme=weights.scheme,
            block_shape=weights.block_shape,
            is_gated=function.kind.is_gated,
        )
        note_tiles(configs)
        path.note("config_key", configs.key)
        assignment = _assign(call, configs.w13.block_size_m)
        pairs = Rows(
            "pairs",
            num_pairs,
            topk_ids=topk_ids,
            expert_map=call.expert_map,
            num_experts=call.global_num_experts,
            num_local_experts=num_local_experts,
        )
        workspace = LayerWorkspace(out, num_pairs, w13_rows, intermediate_size, hidden_size)
        routing = {
            "topk_ids": topk_ids,
            "topk_weights": call.topk_weights,
            "sorted_token_ids": assignment.sorted_token_ids,
            "expert_ids": assignment.expert_ids,
            "allow_tf32": call.allow_tf32,
        }

        lora = None
        if call.lora is not None:
            rows = adapters_of_pairs(
                call.lora.lora_ids,
                call.lora.table.w13,
                topk_ids,
                call.expert_map,
                call.global_num_experts,
                assignment.sorted_token_ids,
                assignment.expert_ids,
                configs.w13.block_size_m,
            )
            lora = LayerAdapters(call.lora.table, rows, platform, allow_tf32=call.allow_tf32)

        x, x_scale = quantize_input(call.hidden_states, weights, scale=call.input_scale)
        grouped_gemm(
            workspace.gate_up,
            x,
            w13_operands(weights, function, x_scale),
            mul_weight=call.apply_router_weight_on_input,
            a_row_is_token=True,
            config=configs.w13,
            shrunk=None if lora is None else lora.w13(call.adapted_states(out.dtype)),
            **routing,
        )
        hidden, hidden_scale = activate_hidden(
            workspace.hidden, workspace.gate_up, weights, function, pairs, platform, keep_plain=lora is not None
        )
        grouped_gemm(
            workspace.expert_output,
            hidden,
            w2_operands(weights, hidden_scale),
            mul_weight=not call.apply_router_weight_on_input,
            a_row_is_token=False,
            config=configs.w2,
            shrunk=None if lora is None else lora.w2(workspace.hidden),
            **routing,
        )
        combine(
            out,
            workspace.expert_output,
            topk_ids,
            call.expert_map,
            call.global_num_experts,
            num_local_experts,
            platform,
        )


def _assign(call: ExpertsCall, block_size: int) -> ExpertAssignment:
    return prepare_expert_assignment(
        call.topk_ids,
        block_size=block_size,
        num_local_experts=call.weights.num_local_experts,
        global_num_experts=call.global_num_experts,
        expert_map=call.expert_map,
        scheme=call.weights.scheme,
        block_shape=call.weights.block_shape,
    )
