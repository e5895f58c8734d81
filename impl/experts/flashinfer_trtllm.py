"""FlashInfer's TensorRT-LLM experts: declared, so that the oracle knows them; no kernel of theirs is shipped."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..config import Activation, MoEConfig, QuantScheme
from ..platform import Platform, Vendor
from .declared import DeclaredExperts, common_checks, first_refusal

_CAPABILITIES = ((10, 0), (10, 3))
_ACTIVATIONS = (Activation.SILU, Activation.SWIGLUOAI, Activation.RELU2_NO_MUL)


class FlashInferTrtllmExperts(DeclaredExperts):
    """`trtllm_bf16_moe` and `trtllm_fp8_block_scale_moe` of flashinfer-python, which route and compute in one call.

    They ship as binaries for compute capability 10.0 and 10.3 and for no other: not 9.0, 11.0 or 12.x
    (https://github.com/NVIDIA/TensorRT-LLM/pull/17570, https://github.com/sgl-project/sglang/pull/39807). Weights are
    laid out in blocks of 128 columns (https://github.com/vllm-project/vllm/issues/41360).
    """

    backend: ClassVar[str] = "flashinfer_trtllm"
    ships: ClassVar[str] = "flashinfer-python"

    @classmethod
    def refusal(cls, config: MoEConfig, platform: Platform) -> str | None:
        """Why these kernels cannot run `config` on `platform`; None where they can."""
        is_fp8 = config.scheme is QuantScheme.FP8_W8A8
        size = config.intermediate_size_per_partition
        return first_refusal(
            (
                platform.vendor is Vendor.NVIDIA and platform.capability in _CAPABILITIES,
                f"its binaries are for compute capability 10.0 and 10.3, not {platform}",
            ),
            *common_checks(config),
            (not config.has_bias, "adds no biases"),
            (config.dtype is torch.bfloat16, f"takes bfloat16, got {config.dtype}"),
            (is_fp8 or config.scheme is QuantScheme.NONE, f"takes the schemes none and fp8_w8a8, got {config.scheme}"),
            (
                not is_fp8 or config.block_shape == (128, 128),
                f"takes fp8 with block_shape (128, 128), got {config.block_shape}",
            ),
            (config.activation in _ACTIVATIONS, f"takes {', '.join(_ACTIVATIONS)}, got {config.activation}"),
            (
                not is_fp8 or config.activation is Activation.SILU,
                f"takes silu with fp8 block scales, got {config.activation}",
            ),
            (size % 128 == 0, f"takes intermediate sizes that 128 divides, got {size}"),
            (config.hidden_size % 128 == 0, f"takes hidden sizes that 128 divides, got {config.hidden_size}"),
        )
