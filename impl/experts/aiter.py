"""AMD's AITER experts: declared, so that the oracle knows them; no kernel of theirs is shipped."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..config import Activation, MoEConfig, QuantScheme
from ..platform import Platform, Vendor
from .declared import DeclaredExperts, common_checks, first_refusal

_ACTIVATIONS = (Activation.SILU, Activation.GELU)


class AiterExperts(DeclaredExperts):
    """`aiter.fused_moe` of ROCm's AITER, for gfx942 and gfx950.

    No LoRA: it has no sum over the top-k to add one before (https://github.com/vllm-project/vllm/pull/32878). fp8 with
    scales in blocks of 128 x 128 or one for each row.
    """

    backend: ClassVar[str] = "aiter"
    ships: ClassVar[str] = "ROCm/aiter"

    @classmethod
    def refusal(cls, config: MoEConfig, platform: Platform) -> str | None:
        """Why AITER cannot run `config` on `platform`; None where it can."""
        return first_refusal(
            (
                platform.vendor is Vendor.AMD and (platform.capability or (0, 0)) >= (9, 4),
                f"its kernels are for gfx942 and gfx950, not {platform}",
            ),
            *common_checks(config),
            (not config.has_bias, "adds no biases"),
            (config.dtype in (torch.bfloat16, torch.float16), f"takes bfloat16 and float16, got {config.dtype}"),
            (
                config.scheme in (QuantScheme.NONE, QuantScheme.FP8_W8A8),
                f"takes the schemes none and fp8_w8a8, got {config.scheme}",
            ),
            (
                config.block_shape in (None, (128, 128)),
                f"takes fp8 with block_shape (128, 128) or none, got {config.block_shape}",
            ),
            (config.activation in _ACTIVATIONS, f"takes {', '.join(_ACTIVATIONS)}, got {config.activation}"),
        )
