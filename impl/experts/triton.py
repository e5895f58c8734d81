"""The Triton backend: align, GEMM, activation, GEMM, sum."""

from __future__ import annotations

from typing import ClassVar

import torch

from .. import path
from ..align import prepare_expert_assignment
from ..config import ActivationFormat, MoEConfig, QuantScheme
from ..kernels.activation import silu_and_mul
from ..kernels.combine import combine
from ..kernels.grouped_gemm import grouped_gemm
from ..platform import Platform, Vendor
from ..tuning.lookup import find_kernel_configs
from .base import ExpertsCall, StandardExperts, unshipped_feature
from .readiness import READY, Readiness, absent


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
    output times the routing weight, the sum. Everything between is float32.
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

    @classmethod
    def readiness(cls, config: MoEConfig, platform: Platform) -> Readiness:
        """Whether this build ships the kernel that `config` needs."""
        del platform
        unshipped = unshipped_feature(config)
        return READY if unshipped is None else absent(unshipped)

    def apply(self, out: torch.Tensor, call: ExpertsCall) -> None:
        """Write the layer into `out`; see `StandardExperts.apply`."""
        hidden_states, w13, w2 = call.hidden_states, call.weights.w13, call.weights.w2
        topk_weights, topk_ids, expert_map = call.topk_weights, call.topk_ids, call.expert_map
        apply_router_weight_on_input, global_num_experts = call.apply_router_weight_on_input, call.global_num_experts
        allow_tf32 = call.allow_tf32
        num_tokens, top_k = topk_ids.shape
        num_local_experts, hidden_size, intermediate_size = w2.shape
        num_pairs = num_tokens * top_k
        platform = Platform.of(hidden_states.device)
        configs = find_kernel_configs(
            num_tokens=num_tokens,
            top_k=top_k,
            num_experts=global_num_experts,
            num_local_experts=num_local_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            dtype=hidden_states.dtype,
            platform=platform,
        )
        path.note("config", configs.w13.as_dict() | {"source": configs.source})
        path.note("config_w2", configs.w2.as_dict() | {"source": configs.source})
        path.note("config_key", configs.key)
        assignment = prepare_expert_assignment(
            topk_ids,
            block_size=configs.w13.block_size_m,
            num_local_experts=num_local_experts,
            global_num_experts=global_num_experts,
            expert_map=expert_map,
        )

        # One workspace: GEMM1's output, whose memory GEMM2's output takes over once the activation has read it, and
        # the activation's output. Parts start on 256 bytes.
        gate_up_size = num_pairs * 2 * intermediate_size
        first_size = (max(gate_up_size, num_pairs * hidden_size) + 127) // 128 * 128
        workspace = torch.empty(
            first_size + num_pairs * intermediate_size, dtype=hidden_states.dtype, device=hidden_states.device
        )
        gate_up = workspace[:gate_up_size].view(num_pairs, 2 * intermediate_size)
        activated = workspace[first_size:].view(num_pairs, intermediate_size)
        y = workspace[: num_pairs * hidden_size].view(num_pairs, hidden_size)

        grouped_gemm(
            gate_up,
            hidden_states,
            w13,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            mul_weight=apply_router_weight_on_input,
            sorted_token_ids=assignment.sorted_token_ids,
            expert_ids=assignment.expert_ids,
            a_row_is_token=True,
            allow_tf32=allow_tf32,
            config=configs.w13,
        )
        silu_and_mul(activated, gate_up, topk_ids, expert_map, global_num_experts, num_local_experts, platform)
        grouped_gemm(
            y,
            activated,
            w2,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            mul_weight=not apply_router_weight_on_input,
            sorted_token_ids=assignment.sorted_token_ids,
            expert_ids=assignment.expert_ids,
            a_row_is_token=False,
            allow_tf32=allow_tf32,
            config=configs.w2,
        )
        combine(out, y, topk_ids, expert_map, global_num_experts, num_local_experts, platform)
