"""The rules as data: who stands in line on which platform, and what moves a backend to the back of it.

Every rule carries its reason and the public record that it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..config import Activation, MoEConfig, QuantScheme
from ..platform import Platform, Vendor
from .backends import UnquantizedMoeBackend as Backend

PRIORITY_SOURCE = "https://github.com/vllm-project/vllm/pull/36286"
LORA_SOURCE = "https://github.com/vllm-project/vllm/pull/40273"

_UNQUANTIZED: Mapping[Vendor, tuple[Backend, ...]] = {
    Vendor.NVIDIA: (Backend.FLASHINFER_TRTLLM, Backend.FLASHINFER_CUTLASS, Backend.TRITON, Backend.BATCHED_TRITON),
    Vendor.AMD: (Backend.AITER, Backend.TRITON, Backend.BATCHED_TRITON),
    Vendor.INTEL: (Backend.XPU, Backend.TRITON),
    Vendor.CPU: (Backend.CPU,),
    Vendor.TPU: (Backend.TPU,),
    Vendor.OUT_OF_TREE: (Backend.OUT_OF_TREE,),
}
# Ours first; what is only declared comes after.
_QUANTIZED: Mapping[Vendor, tuple[Backend, ...]] = {
    Vendor.NVIDIA: (Backend.TRITON, Backend.BATCHED_TRITON, Backend.FLASHINFER_TRTLLM, Backend.FLASHINFER_CUTLASS),
    Vendor.AMD: (Backend.TRITON, Backend.BATCHED_TRITON, Backend.AITER),
    Vendor.INTEL: (Backend.TRITON, Backend.BATCHED_TRITON, Backend.XPU),
    Vendor.CPU: (Backend.CPU,),
    Vendor.TPU: (Backend.TPU,),
    Vendor.OUT_OF_TREE: (Backend.OUT_OF_TREE,),
}
PRIORITIES: Mapping[QuantScheme, Mapping[Vendor, tuple[Backend, ...]]] = {
    scheme: _UNQUANTIZED if scheme is QuantScheme.NONE else _QUANTIZED for scheme in QuantScheme
}

# Never chosen by `auto`, but honoured where asked for by name.
ONLY_ON_REQUEST: Mapping[Vendor, Mapping[Backend, str]] = {
    Vendor.CPU: {
        Backend.TRITON: "only where asked for: on a CPU it runs under Triton's interpreter, which is made for tests",
        Backend.BATCHED_TRITON: "only where asked for: on a CPU it runs under Triton's interpreter, made for tests",
    },
    Vendor.INTEL: {Backend.BATCHED_TRITON: "only where asked for: it stands in no priority list of this platform"},
}

# Platforms whose LoRA is applied by the Triton experts alone.
LORA_VENDORS = frozenset({Vendor.NVIDIA, Vendor.AMD, Vendor.INTEL})


@dataclass(frozen=True)
class Demotion:
    """A rule that moves backends to the back of the line, one after the other.

    Attributes:
        name: how reports call it.
        applies: whether it holds for a configuration and a platform.
        backends: who moves, in this order.
        why: the reason.
        source: the public record of it.
    """

    name: str
    applies: Callable[[MoEConfig, Platform], bool]
    backends: tuple[Backend, ...]
    why: str
    source: str


# In the order in which they are applied.
DEMOTIONS: tuple[Demotion, ...] = (
    Demotion(
        "hopper",
        lambda config, platform: platform.is_hopper,
        (Backend.FLASHINFER_TRTLLM, Backend.FLASHINFER_CUTLASS),
        "on Hopper the FlashInfer experts are slower than Triton",
        "https://github.com/vllm-project/vllm/pull/44220",
    ),
    Demotion(
        "data_parallel",
        lambda config, platform: config.parallel.dp_size > 1,
        (Backend.FLASHINFER_CUTLASS,),
        "with data parallelism FlashInfer's CUTLASS experts have crashed",
        "https://github.com/vllm-project/vllm/issues/37758",
    ),
    Demotion(
        "swigluoai",
        lambda config, platform: config.activation is Activation.SWIGLUOAI,
        (Backend.FLASHINFER_TRTLLM, Backend.FLASHINFER_CUTLASS),
        "FlashInfer's experts have lost SwigluOAI's clamp and alpha",
        "https://github.com/vllm-project/vllm/pull/45738",
    ),
)


def candidates(config: MoEConfig, platform: Platform) -> tuple[list[Backend], list[Demotion]]:
    """The line of candidates for a configuration, and the demotions that hold for it, in the order applied.

    A demotion holds whether or not its backends stand in this platform's line.
    """
    line = list(PRIORITIES[config.scheme][platform.vendor])
    held = [rule for rule in DEMOTIONS if rule.applies(config, platform)]
    for rule in held:
        for backend in rule.backends:
            if backend in line:
                line.remove(backend)
                line.append(backend)
    return line, held
