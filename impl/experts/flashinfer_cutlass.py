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
from typing import ClassVar

import torch

from .. import path
from ..config import Activation, ActivationFunction, MoEConfig, QuantScheme
from ..platform import Platform, Vendor
from .base import ExpertsCall, StandardExperts
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
        # By the id of w13, for as long as it lives: itself, the version converted, whether rows alternate, the copy.
        self._converted: dict[int, tuple[weakref.ref[torch.Tensor], int, bool, torch.Tensor]] = {}
        self._parameters: dict[tuple[float, float, int, torch.device], dict[str, torch.Tensor]] = {}

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
            (not config.has_bias, "this adapter passes no biases on"),
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

    def prepare(self, w13: torch.Tensor, activation: ActivationFunction) -> torch.Tensor:
        """w13 with the up rows before the gate rows, converted once: the copy is kept until w13 changes or goes.

        Args:
            w13: [E_local, 2I, H] as the activation says, or [E_local, I, H] of one without gate.
            activation: says which, and whether gate and up rows alternate.

        Returns:
            The kernel's layout; w13 itself where nothing is to be moved.
        """
        if not activation.kind.is_gated:
            return w13.contiguous()
        known = self._converted.get(id(w13))
        if known is not None and known[0]() is w13 and known[1:3] == (w13._version, activation.interleaved):
            return known[3]
        gate, up = (w13[:, 0::2], w13[:, 1::2]) if activation.interleaved else w13.chunk(2, dim=1)
        converted = torch.cat((up, gate), dim=1)
        self._converted[id(w13)] = (
            weakref.ref(w13, self._forget(id(w13))),
            w13._version,
            activation.interleaved,
            converted,
        )
        path.note("weights_converted", self.backend)
        return converted

    def _forget(self, key: int) -> Callable[[weakref.ref[torch.Tensor]], None]:
        """Drop the copy with the weights that it was made from."""

        def forget(gone: weakref.ref[torch.Tensor]) -> None:
            if key in self._converted and self._converted[key][0] is gone:
                del self._converted[key]

        return forget

    def _activation_parameters(
        self, activation: ActivationFunction, num_experts: int, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """alpha, beta and limit of swigluoai for each local expert: gate * sigmoid(alpha * gate) * (up + beta)."""
        if activation.kind is not Activation.SWIGLUOAI:
            return {}
        key = (activation.alpha, activation.limit, num_experts, device)
        known = self._parameters.get(key)
        if known is None:
            values = {"swiglu_alpha": activation.alpha, "swiglu_beta": 1.0, "swiglu_limit": activation.limit}
            known = self._parameters[key] = {
                name: torch.full((num_experts,), value, dtype=torch.float32, device=device)
                for name, value in values.items()
            }
        return known

    def apply(self, out: torch.Tensor, call: ExpertsCall) -> None:
        """Write the layer into `out`; see `StandardExperts.apply`.

        Raises:
            ImportError: flashinfer-python is not installed.
            ValueError: routing weights on the input, or biases, which this adapter does not pass on.
        """
        weights, activation = call.weights, call.activation
        if call.apply_router_weight_on_input:
            raise ValueError("apply_router_weight_on_input: expected False for flashinfer_cutlass, got True")
        if weights.has_bias:
            raise ValueError("w13_bias, w2_bias: expected None for flashinfer_cutlass, got biases")
        if weights.quant is not None:
            raise ValueError(f"quant: expected None for flashinfer_cutlass, got {weights.scheme}")
        fused_moe = importlib.import_module("flashinfer.fused_moe")
        result = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        fused_moe.cutlass_fused_moe(
            call.hidden_states.contiguous(),
            local_expert_ids(call.topk_ids, call.expert_map, call.global_num_experts),
            call.topk_weights.contiguous(),
            self.prepare(weights.w13, activation),
            weights.w2.contiguous(),
            out.dtype,
            quant_scales=[],
            output=result,
            activation_type=getattr(fused_moe.ActivationType, _ACTIVATIONS[activation.kind]),
            use_fused_finalize=False,
            **self._activation_parameters(activation, weights.num_local_experts, out.device),
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
