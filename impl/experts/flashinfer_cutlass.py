"""FlashInfer's CUTLASS experts, through the public `cutlass_fused_moe` of flashinfer-python (an optional extra).

Its kernel wants the up rows of w13 before the gate rows, local expert ids, and contiguous operands. It compiles its
module for the device's architecture when first called, which takes many minutes: nothing here imports it or compiles
it before a user asked for it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from .. import path
from ..config import Activation, MoEConfig, QuantScheme
from ..platform import Platform, Vendor
from .base import StandardExperts
from .declared import common_checks, first_refusal
from .readiness import READY, Readiness, absent, on_request

# The module that FlashInfer builds for each capability: its dispatch knows these and no others.
_MODULES = {
    (8, 9): "fused_moe_89",
    (9, 0): "fused_moe_90",
    (10, 0): "fused_moe_100",
    (10, 3): "fused_moe_103",
    (11, 0): "fused_moe_100",
    (12, 0): "fused_moe_120",
    (12, 1): "fused_moe_120",
}
# The names of flashinfer.ActivationType.
_ACTIVATIONS = {
    Activation.SILU: "Swiglu",
    Activation.GELU: "Geglu",
    Activation.GELU_TANH: "GegluTanh",
    Activation.SWIGLUOAI: "Swiglu",
    Activation.SILU_NO_MUL: "Silu",
    Activation.GELU_NO_MUL: "Gelu",
    Activation.RELU2_NO_MUL: "Relu2",
}
# gpt-oss: gate * sigmoid(alpha * gate) * (up + beta), both clamped to the limit (arXiv 2508.10925 and its model code).
_SWIGLUOAI = {"swiglu_alpha": 1.702, "swiglu_beta": 1.0, "swiglu_limit": 7.0}
# Builds of its own that FlashInfer prefers on a GPU of 78 multiprocessors (H20).
_H20_MULTIPROCESSORS = 78
_H20_SUFFIX = "_h20_prebuilt_d"


def _is_target(folder: str, capability: tuple[int, int]) -> bool:
    """Whether a cache folder such as `80_90a` was built for the capability."""
    number = f"{capability[0]}{capability[1]}"
    return any(target.rstrip("abcdefghijklmnopqrstuvwxyz") == number for target in folder.split("_"))


def compiled_module(name: str, capability: tuple[int, int]) -> Path | None:
    """Where FlashInfer would find its module already compiled; None where it would have to compile.

    Looks at files alone: beside the package (`data/aot`), in the jit-cache wheels, and in the cache of earlier
    compilations of the installed version (`FLASHINFER_WORKSPACE_BASE` or the home folder).
    """
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or not spec.submodule_search_locations:
        return None
    package = Path(next(iter(spec.submodule_search_locations)))
    library = Path(name) / f"{name}.so"
    if (found := package / "data" / "aot" / library).is_file():
        return found
    wheels = package.parent.glob(f"flashinfer_jit_cache*/jit_cache/{library}")
    if (found := next(wheels, None)) is not None:
        return found
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return None
    base = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home())
    for found in (base / ".cache" / "flashinfer" / version).glob(f"*/cached_ops/{library}"):
        if _is_target(found.parents[2].name, capability):
            return found
    return None


class FlashInferCutlassExperts(StandardExperts):
    """`flashinfer.fused_moe.cutlass_fused_moe` on bfloat16 and float16 weights.

    Routing weights are multiplied into the output. The sum over the top-k is a kernel of its own (`use_fused_finalize`
    off): the fused one adds with atomics, and repeats no result. The converted copy of a w13 lives as long as the
    tensor that was passed, and costs as much memory again: pass the same tensor, not a new view, on every call.
    """

    backend: ClassVar[str] = "flashinfer_cutlass"

    def __init__(self) -> None:
        # By the id of w13, for as long as it lives: itself, the version converted, the copy.
        self._converted: dict[int, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}
        self._parameters: dict[tuple[int, torch.device], dict[str, torch.Tensor]] = {}

    @classmethod
    def refusal(cls, config: MoEConfig, platform: Platform) -> str | None:
        """Why these kernels cannot run `config` on `platform`; None where they can.

        An intermediate size that 128 does not divide has hung (https://github.com/vllm-project/vllm/pull/51492).
        """
        size = config.intermediate_size_per_partition
        return first_refusal(
            (
                platform.vendor is Vendor.NVIDIA and platform.capability in _MODULES,
                f"its kernels are for compute capability 8.9, 9.0, 10.0, 10.3, 11.0 and 12.x, not {platform}",
            ),
            *common_checks(config),
            (config.scheme is QuantScheme.NONE, f"takes unquantised weights, got {config.scheme}"),
            (config.dtype in (torch.bfloat16, torch.float16), f"takes bfloat16 and float16, got {config.dtype}"),
            (config.activation in _ACTIVATIONS, f"takes {', '.join(_ACTIVATIONS)}, got {config.activation}"),
            (size % 128 == 0, f"takes intermediate sizes that 128 divides (others have hung), got {size}"),
            (config.hidden_size % 8 == 0, f"takes hidden sizes that 8 divides, got {config.hidden_size}"),
        )

    @classmethod
    def readiness(cls, config: MoEConfig, platform: Platform) -> Readiness:
        """Absent, installed but not compiled (usable where asked for), or ready; nothing is imported to find out."""
        del config
        if importlib.util.find_spec("flashinfer") is None:
            return absent("flashinfer-python is not installed (pip install 'moegate[flashinfer]')")
        module = _MODULES.get(platform.capability or (0, 0)) if platform.vendor is Vendor.NVIDIA else None
        if module is None:
            return absent(f"FlashInfer builds no fused MoE module for {platform}")
        capability = platform.capability or (0, 0)
        may_compile = not os.environ.get("FLASHINFER_DISABLE_JIT")
        if may_compile and platform.num_sms == _H20_MULTIPROCESSORS and module == "fused_moe_90":
            module += _H20_SUFFIX
        if compiled_module(module, capability) is not None:
            return READY
        if not may_compile:
            return absent(f"{module} is not compiled, and FLASHINFER_DISABLE_JIT forbids to compile it")
        return on_request(
            f"installed but not compiled: the first use compiles {module} for many minutes; ask for it by name"
        )

    def prepare(self, w13: torch.Tensor, activation: Activation) -> torch.Tensor:
        """w13 with the up rows before the gate rows, converted once: the copy is kept until w13 changes or goes.

        Args:
            w13: [E_local, 2I, H] gate rows first, or [E_local, I, H] of an activation without gate.
            activation: says which.

        Returns:
            The kernel's layout; w13 itself where nothing is to be moved.
        """
        if not activation.is_gated:
            return w13.contiguous()
        known = self._converted.get(id(w13))
        if known is not None and known[0]() is w13 and known[1] == w13._version:
            return known[2]
        gate, up = w13.chunk(2, dim=1)
        converted = torch.cat((up, gate), dim=1)
        self._converted[id(w13)] = (weakref.ref(w13, self._forget(id(w13))), w13._version, converted)
        path.note("weights_converted", self.backend)
        return converted

    def _forget(self, key: int) -> Callable[[weakref.ref[torch.Tensor]], None]:
        """Drop the copy with the weights that it was made from."""

        def forget(gone: weakref.ref[torch.Tensor]) -> None:
            if key in self._converted and self._converted[key][0] is gone:
                del self._converted[key]

        return forget

    def _activation_parameters(self, activation: Activation, num_experts: int, device: torch.device) -> dict[str, Any]:
        if activation is not Activation.SWIGLUOAI:
            return {}
        known = self._parameters.get((num_experts, device))
        if known is None:
            known = self._parameters[num_experts, device] = {
                name: torch.full((num_experts,), value, dtype=torch.float32, device=device)
                for name, value in _SWIGLUOAI.items()
            }
        return known

    def apply(
        self,
        out: torch.Tensor,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        activation: Activation,
        apply_router_weight_on_input: bool,
        expert_map: torch.Tensor | None,
        global_num_experts: int,
        allow_tf32: bool,
    ) -> None:
        """Write the layer into `out`; see `StandardExperts.apply`.

        Raises:
            ImportError: flashinfer-python is not installed.
            ValueError: routing weights on the input, which these kernels do not take.
        """
        del allow_tf32  # no float32 operands
        if apply_router_weight_on_input:
            raise ValueError("apply_router_weight_on_input: expected False for flashinfer_cutlass, got True")
        fused_moe = importlib.import_module("flashinfer.fused_moe")
        result = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        fused_moe.cutlass_fused_moe(
            hidden_states.contiguous(),
            local_expert_ids(topk_ids, expert_map, global_num_experts),
            topk_weights.contiguous(),
            self.prepare(w13, activation),
            w2.contiguous(),
            out.dtype,
            quant_scales=[],
            output=result,
            activation_type=getattr(fused_moe.ActivationType, _ACTIVATIONS[activation]),
            use_fused_finalize=False,
            **self._activation_parameters(activation, w2.shape[0], w2.device),
        )
        if result is not out:
            out.copy_(result)


def local_expert_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, global_num_experts: int) -> torch.Tensor:
    """Ids of this rank's experts, int32 and contiguous; -1, which the kernel passes over, for all others.

    Args:
        topk_ids: [M, top_k] global ids, -1 for none.
        expert_map: [E] global to local id, -1 for experts of other ranks; None where all are local.
        global_num_experts: E; an id outside [0, E) is no expert.
    """
    valid = (topk_ids >= 0) & (topk_ids < global_num_experts)
    if expert_map is None:
        return torch.where(valid, topk_ids, -1).to(torch.int32).contiguous()
    local = expert_map[torch.where(valid, topk_ids, 0).long()]
    return torch.where(valid, local, -1).to(torch.int32).contiguous()
