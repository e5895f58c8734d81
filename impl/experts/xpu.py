"""Intel's XPU experts: declared, so that the oracle knows them; no kernel of theirs is shipped."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..config import Activation, MoEConfig, QuantScheme
from ..platform import Platform, Vendor
from .declared import DeclaredExperts, common_checks, first_refusal

_ACTIVATIONS = (Activation.SILU, Activation.GELU, Activation.SWIGLUOAI)


class XpuExperts(DeclaredExperts):
    """`xpu_fused_moe` of vllm-xpu-kernels: unquantised, and int4 with any group along K.

    Groups of 32 as of 128 (https://github.com/vllm-project/vllm/pull/45136).
    """

    backend: ClassVar[str] = "xpu"
    ships: ClassVar[str] = "vllm-xpu-kernels"

    @classmethod
    def refusal(cls, config: MoEConfig, platform: Platform) -> str | None:
        """Why these kernels cannot run `config` on `platform`; None where they can."""
        return first_refusal(
            (platform.vendor is Vendor.INTEL, f"its kernels are for xpu, not {platform}"),
            *common_checks(config),
            (config.dtype in (torch.bfloat16, torch.float16), f"takes bfloat16 and float16, got {config.dtype}"),
            (
                config.scheme in (QuantScheme.NONE, QuantScheme.INT4_W4A16),
                f"takes the schemes none and int4_w4a16, got {config.scheme}",
            ),
            (config.activation in _ACTIVATIONS, f"takes {', '.join(_ACTIVATIONS)}, got {config.activation}"),
        )
