"""The CPU backend: plain torch, expert by expert over the experts that have tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from ..config import ActivationFormat, MoEConfig
from ..platform import Platform, Vendor
from .base import ExpertsCall, StandardExperts, unshipped_feature
from .readiness import READY, Readiness, absent


class CpuExperts(StandardExperts):
    """Matrix products in float32; rounds to the storage dtype exactly where the Triton backend does."""

    backend: ClassVar[str] = "cpu"

    @classmethod
    def refusal(cls, config: MoEConfig, platform: Platform) -> str | None:
        """Why plain torch cannot run `config` on `platform`; None where it can."""
        if platform.vendor is not Vendor.CPU:
            return f"the CPU backend does not run on {platform}"
        if config.activation_format is not ActivationFormat.STANDARD:
            return f"takes the standard activation format, got {config.activation_format}"
        return None

    @classmethod
    def readiness(cls, config: MoEConfig, platform: Platform) -> Readiness:
        """Whether this build computes what `config` needs."""
        del platform
        unshipped = unshipped_feature(config)
        return READY if unshipped is None else absent(unshipped)

    @torch.no_grad()
    def apply(self, out: torch.Tensor, call: ExpertsCall) -> None:
        """Write the layer into `out`; see `StandardExperts.apply`."""
        hidden_states, weights_of, expert_map = call.hidden_states, call.weights, call.expert_map
        w13, w2 = weights_of.w13, weights_of.w2
        num_tokens, top_k = call.topk_ids.shape
        num_local_experts, hidden_size, intermediate_size = w2.shape
        dtype = hidden_states.dtype

        # A stray id is no expert, as in the kernels.
        expert = call.topk_ids.reshape(-1).long()
        expert = torch.where((expert >= 0) & (expert < call.global_num_experts), expert, -1)
        if expert_map is not None:
            expert = torch.where(expert >= 0, expert_map.long()[expert], -1)
            expert = torch.where((expert >= 0) & (expert < num_local_experts), expert, -1)
        by_expert = torch.argsort(expert, stable=True)
        counts = torch.bincount(expert + 1, minlength=num_local_experts + 1).tolist()
        weights = call.topk_weights.reshape(-1, 1)

        y = torch.zeros((num_tokens * top_k, hidden_size), dtype=dtype)
        start = counts[0]
        for local, count in enumerate(counts[1:]):
            if count == 0:
                continue
            pairs = by_expert[start : start + count]
            start += count
            gate_up = hidden_states[pairs // top_k].float() @ w13[local].float().T
            if call.apply_router_weight_on_input:
                gate_up *= weights[pairs]
            gate, up = gate_up.to(dtype).float().split(intermediate_size, dim=1)
            activated = (functional.silu(gate) * up).to(dtype)
            expert_out = activated.float() @ w2[local].float().T
            if not call.apply_router_weight_on_input:
                expert_out *= weights[pairs]
            y[pairs] = expert_out.to(dtype)

        total = torch.zeros((num_tokens, hidden_size), dtype=torch.float32)
        for choice in y.view(num_tokens, top_k, hidden_size).unbind(1):
            total += choice
        out.copy_(total)
