"""The Triton backend for the batched activation format: `[E_local, max_tokens, H]` with a count for each expert."""

from __future__ import annotations

from typing import ClassVar

import torch

from .. import path
from ..config import ActivationFormat, MoEConfig, QuantScheme
from ..kernels.activation import batched_silu_and_mul
from ..kernels.batched_gemm import batched_gemm
from ..platform import Platform
from ..tuning.kernel_config import layer_kernel_configs
from .base import BatchedCall, BatchedExperts, unshipped_feature
from .readiness import READY, Readiness, absent
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

    @classmethod
    def readiness(cls, config: MoEConfig, platform: Platform) -> Readiness:
        """Whether this build ships the kernel that `config` needs."""
        del platform
        unshipped = unshipped_feature(config)
        return READY if unshipped is None else absent(f"in the batched activation format {unshipped}")

    def apply(self, out: torch.Tensor, call: BatchedCall) -> None:
        """Write each token through its expert; see `BatchedExperts.apply`."""
        hidden_states, w13, w2 = call.hidden_states, call.weights.w13, call.weights.w2
        expert_num_tokens, allow_tf32 = call.expert_num_tokens, call.allow_tf32
        num_experts, max_tokens, hidden_size = hidden_states.shape
        intermediate_size = w2.shape[2]
        platform = Platform.of(hidden_states.device)
        # The host knows the slabs and not the counts: tiles are chosen for slabs that are half full, which gives a
        # slab one row block where a block can hold it. Tuned files say nothing here: their keys count the tokens of a
        # layer, before dispatch has spread them.
        w13_config, w2_config, source = layer_kernel_configs(
            num_tokens=max_tokens,
            top_k=1,
            num_experts=2,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            dtype=hidden_states.dtype,
            platform=platform,
        )
        path.note("config", w13_config.as_dict() | {"source": source})
        path.note("config_w2", w2_config.as_dict() | {"source": source})

        # One workspace: GEMM1's output and the activation's; parts start on 256 bytes.
        num_rows = num_experts * max_tokens
        gate_up_size = num_rows * 2 * intermediate_size
        first_size = (gate_up_size + 127) // 128 * 128
        workspace = torch.empty(
            first_size + num_rows * intermediate_size, dtype=hidden_states.dtype, device=hidden_states.device
        )
        gate_up = workspace[:gate_up_size].view(num_experts, max_tokens, 2 * intermediate_size)
        activated = workspace[first_size:].view(num_experts, max_tokens, intermediate_size)

        batched_gemm(gate_up, hidden_states, w13, expert_num_tokens, allow_tf32=allow_tf32, config=w13_config)
        batched_silu_and_mul(activated, gate_up, expert_num_tokens, platform)
        batched_gemm(out, activated, w2, expert_num_tokens, allow_tf32=allow_tf32, config=w2_config)
