"""The Triton backend for the batched activation format: `[E_local, max_tokens, H]` with a count for each expert."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import ActivationFormat, MoEConfig, QuantScheme
from ..platform import Platform, Vendor
from .base import Experts
from .readiness import Readiness, absent

_SCHEMES = (QuantScheme.NONE, QuantScheme.FP8_W8A8)


class BatchedTritonExperts(Experts):
    """Grouped GEMMs in Triton over tokens that arrive sorted by expert, as all-to-all dispatch delivers them."""

    backend: ClassVar[str] = "batched_triton"

    @classmethod
    def refusal(cls, config: MoEConfig, platform: Platform) -> str | None:
        """Why the batched kernels cannot run `config` on `platform`; None where they can."""
        if platform.vendor is Vendor.CPU and not platform.interpreted:
            return "Triton runs on a CPU under its interpreter alone (TRITON_INTERPRET=1 before Python starts)"
        if not platform.runs_triton:
            return f"Triton does not run on {platform}"
        if platform.vendor is Vendor.NVIDIA and (platform.capability or (0, 0)) < (8, 0):
            return f"the kernels need compute capability 8.0, {platform} has less"
        if config.activation_format is not ActivationFormat.BATCHED:
            return f"takes the batched activation format, got {config.activation_format}"
        if config.scheme not in _SCHEMES:
            return f"takes the schemes {', '.join(_SCHEMES)}, got {config.scheme}"
        if config.scheme is QuantScheme.FP8_W8A8 and not platform.has_fp8_e4m3:
            return f"fp8 e4m3 needs compute capability 8.9 or gfx942 and later, {platform} has none"
        return None

    @classmethod
    def readiness(cls, config: MoEConfig, platform: Platform) -> Readiness:
        """Absent: this build ships no batched kernel."""
        del config, platform
        return absent("this build ships no kernel for the batched activation format yet")

    def apply(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            NotImplementedError: always; `readiness` says why.
        """
        raise NotImplementedError("batched_triton: this build ships no kernel for the batched activation format yet")
