"""The platform as a value: what the oracle and the tile choice are told about the hardware.

Nothing below the command line asks torch which GPU there is; a `Platform` is passed in, so that every decision for
every platform can be computed, and tested, on any machine.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import torch

from .checks import expect_bool, expect_device, expect_instance, expect_int, shown


class Vendor(StrEnum):
    """Who makes the device, under the name that torch and the engines use for its software stack."""

    NVIDIA = "cuda"
    AMD = "rocm"
    INTEL = "xpu"
    CPU = "cpu"
    TPU = "tpu"
    OUT_OF_TREE = "out_of_tree"


# Compute capabilities that exist (Volta to Blackwell), and the shared memory in bytes that one block may use
# (CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability").
_NVIDIA_SHARED_MEMORY = {
    (7, 0): 98_304,
    (7, 2): 98_304,
    (7, 5): 65_536,
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 7): 166_912,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (10, 1): 232_448,
    (10, 3): 232_448,
    (11, 0): 232_448,
    (12, 0): 101_376,
    (12, 1): 101_376,
}
# gfx architecture to the (major, minor) that torch reports for it, and its LDS bytes per workgroup.
_AMD_ARCHITECTURES = {"gfx90a": ((9, 0), 65_536), "gfx942": ((9, 4), 65_536), "gfx950": ((9, 5), 163_840)}


@dataclass(frozen=True)
class Platform:
    """What one device is.

    Attributes:
        vendor: the software stack.
        capability: compute capability (major, minor); for ROCm the first two parts of the gfx architecture, as torch
            reports them; None where the vendor has no such number.
        name: the device's name as its driver gives it; it keys tuned configuration files.
        num_sms: streaming multiprocessors (compute units on AMD); 0 where unknown.
        shared_memory: bytes of shared memory that one block may use; 0 where it sets no limit.
        interpreted: Triton kernels run under Triton's interpreter (`TRITON_INTERPRET=1`) on this process's CPU.
    """

    vendor: Vendor
    capability: tuple[int, int] | None = None
    name: str = ""
    num_sms: int = 0
    shared_memory: int = 0
    interpreted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.vendor, Vendor):
            raise TypeError(f"vendor: expected a Vendor, got {shown(self.vendor)}")
        if self.capability is not None and not isinstance(self.capability, tuple):
            raise TypeError(f"capability: expected (major, minor) or None, got {shown(self.capability)}")
        expect_instance("name", self.name, str)
        expect_int("num_sms", self.num_sms, low=0)
        expect_int("shared_memory", self.shared_memory, low=0)
        expect_bool("interpreted", self.interpreted)
        if self.vendor is Vendor.NVIDIA and self.capability not in _NVIDIA_SHARED_MEMORY:
            known = ", ".join(f"{major}.{minor}" for major, minor in _NVIDIA_SHARED_MEMORY)
            raise ValueError(f"capability: expected one of {known} for cuda, got {self.capability!r}")
        known_amd = [capability for capability, _ in _AMD_ARCHITECTURES.values()]
        if self.vendor is Vendor.AMD and self.capability not in known_amd:
            raise ValueError(f"capability: expected one of {known_amd} for rocm, got {self.capability!r}")
        if self.vendor not in (Vendor.NVIDIA, Vendor.AMD) and self.capability is not None:
            raise ValueError(f"capability: expected None for {self.vendor}, got {self.capability!r}")

    @property
    def family(self) -> int | None:
        """The capability's family: 80 for 8.x, 90 for 9.x, 100 for 10.x, 120 for 12.x; None without a capability."""
        return None if self.capability is None else self.capability[0] * 10

    @property
    def is_hopper(self) -> bool:
        """Whether this is an NVIDIA GPU of family 90: not ROCm, where torch reports gfx942 as 9.4."""
        return self.vendor is Vendor.NVIDIA and self.family == 90

    @property
    def is_cuda_alike(self) -> bool:
        """Whether torch reaches this device as `cuda` (NVIDIA and AMD)."""
        return self.vendor in (Vendor.NVIDIA, Vendor.AMD)

    @property
    def has_fp8_e4m3(self) -> bool:
        """Whether fp8 e4m3 is a type of this device: NVIDIA from 8.9, AMD from gfx942; a CPU emulates it."""
        if self.vendor is Vendor.NVIDIA:
            return self.capability is not None and self.capability >= (8, 9)
        if self.vendor is Vendor.AMD:
            return self.capability is not None and self.capability >= (9, 4)
        return self.vendor is Vendor.CPU

    @property
    def runs_triton(self) -> bool:
        """Whether Triton kernels can run here: on a GPU, or on a CPU under Triton's interpreter."""
        return self.is_cuda_alike or self.vendor is Vendor.INTEL or (self.vendor is Vendor.CPU and self.interpreted)

    def __str__(self) -> str:
        """The form that `parse` reads, such as `cuda:9.0` or `rocm:gfx942`."""
        if self.vendor is Vendor.AMD:
            return "rocm:" + next(arch for arch, (cap, _) in _AMD_ARCHITECTURES.items() if cap == self.capability)
        if self.capability is not None:
            return f"{self.vendor}:{self.capability[0]}.{self.capability[1]}"
        return str(self.vendor)

    @staticmethod
    def parse(text: str) -> Platform:
        """A platform from `cuda:9.0`, `rocm:gfx942`, `xpu`, `cpu`, `tpu` or `out_of_tree`.

        Raises:
            TypeError, ValueError: no string, or an unknown vendor, architecture or capability, by name.
        """
        expect_instance("platform", text, str)
        vendor_name, _, rest = text.partition(":")
        vendors = [v.value for v in Vendor]
        if vendor_name not in vendors:
            raise ValueError(f"platform: expected one of {vendors}, got {text!a:.80}")
        vendor = Vendor(vendor_name)
        if vendor is Vendor.NVIDIA:
            match = re.fullmatch(r"([0-9]{1,3})\.([0-9]{1,3})", rest)
            if match is None:
                raise ValueError(f"platform: expected a capability such as cuda:9.0, got {text!a:.80}")
            capability = (int(match[1]), int(match[2]))
            if capability not in _NVIDIA_SHARED_MEMORY:
                known = ", ".join(f"cuda:{major}.{minor}" for major, minor in _NVIDIA_SHARED_MEMORY)
                raise ValueError(f"platform: expected one of {known}, got {text!r}")
            return Platform(vendor, capability, shared_memory=_NVIDIA_SHARED_MEMORY.get(capability, 0))
        if vendor is Vendor.AMD:
            if rest not in _AMD_ARCHITECTURES:
                raise ValueError(
                    f"platform: expected an architecture of {list(_AMD_ARCHITECTURES)} as in rocm:gfx942, got {text!r}"
                )
            capability, shared_memory = _AMD_ARCHITECTURES[rest]
            return Platform(vendor, capability, shared_memory=shared_memory)
        if rest:
            raise ValueError(f"platform: expected nothing after {vendor}, got {text!a:.80}")
        return Platform(vendor)

    @staticmethod
    def of(device: torch.device | str) -> Platform:
        """The platform of a torch device of this machine.

        Raises:
            TypeError, ValueError: no device, or a type that torch knows and moegate does not.
        """
        device = expect_device("device", device)
        if device.type == "cpu":
            return _cpu()
        if device.type == "cuda":
            return _cuda_alike(torch.cuda.current_device() if device.index is None else device.index)
        if device.type == "xpu":
            return Platform(Vendor.INTEL, name=torch.xpu.get_device_name(device))
        if device.type in ("xla", "tpu"):
            return Platform(Vendor.TPU)
        if device.type == torch._C._get_privateuse1_backend_name():
            return Platform(Vendor.OUT_OF_TREE, name=device.type)
        raise ValueError(f"device: expected cpu, cuda, xpu, xla or an out-of-tree backend, got {device}")

    @staticmethod
    def detect() -> Platform:
        """The platform of this process's default accelerator, or of its CPU where there is none."""
        if torch.cuda.is_available():
            return Platform.of("cuda")
        if hasattr(torch, "xpu") and torch.xpu.is_available():
            return Platform.of("xpu")
        return Platform.of("cpu")


@cache
def _cuda_alike(index: int) -> Platform:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        capability, shared_memory = _AMD_ARCHITECTURES.get(
            properties.gcnArchName.split(":")[0], ((properties.major, properties.minor), 65_536)
        )
        return Platform(Vendor.AMD, capability, properties.name, properties.multi_processor_count, shared_memory)
    capability = (properties.major, properties.minor)
    return Platform(
        Vendor.NVIDIA,
        capability,
        properties.name,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


@cache
def _cpu() -> Platform:
    # Triton reads the variable when it is imported, and a process keeps the mode that it started with.
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    return Platform(Vendor.CPU, name="cpu", interpreted=interpreted)
