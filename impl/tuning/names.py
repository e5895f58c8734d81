"""What a tuned file is for, and the name that follows from it: the writer and the lookup share these functions.

The public convention, which vLLM's and SGLang's files follow, knows the experts of one rank (E), their intermediate
size (N), the device, the quantisation and its block shape. The native one adds what the best tile depends on besides:
the hidden size (H), top_k and the group of weight-only scales.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..checks import expect_instance, expect_int, expect_one_of
from ..config import QuantScheme
from ..platform import Platform

_MAX_DEVICE_NAME = 100
# By a key's dtype, block_shape and group, how the command line asks for the formats whose tiles it searches.
_TUNED = {
    (None, None, None): "",
    ("float32", None, None): " --dtype fp32",
    ("fp8_w8a8", (128, 128), None): " --dtype fp8-block",
}
_NAME = re.compile(
    r"E=(?P<E>[0-9]{1,10}),N=(?P<N>[0-9]{1,10})(?:,H=(?P<H>[0-9]{1,10}),top_k=(?P<top_k>[0-9]{1,10}))?,device_name=(?P<device>[^,]+?)"
    r"(?:,dtype=(?P<dtype>[a-z0-9_]+))?(?:,block_shape=\[(?P<n>[0-9]{1,10}),(?P<k>[0-9]{1,10})\])?(?:,group=(?P<group>[0-9]{1,10}))?\.json"
)


def normalise_device_name(name: str) -> str:
    """A device's name as files spell it: underscores for spaces, and one name for the H200 family.

    Whatever else a file name cannot hold, or would end the field, is an underscore too.

    Raises:
        TypeError: no string.
    """
    expect_instance("name", name, str)
    spelled = re.sub(r"[^A-Za-z0-9_.()+@#-]", "_", name.strip())[:_MAX_DEVICE_NAME]
    return "NVIDIA_H200" if "H200" in spelled.split("_") else spelled


@dataclass(frozen=True)
class ConfigKey:
    """What a tuned file is for.

    Attributes:
        num_experts: E, the experts whose weights one rank holds.
        intermediate_size: N, the intermediate size of one rank, unpacked.
        device_name: normalised.
        dtype: the quantisation scheme or `float32`; None for bfloat16 and float16, which share files.
        block_shape: (n, k) of block-wise scales, None where either is 0.
        hidden_size: H; None in the public convention.
        top_k: None in the public convention.
        group: of scales along K alone, None where there is none or in the public convention.

    Raises:
        TypeError: names that are no strings.
        ValueError: a size under 1, a device name that is not normalised or empty, native fields without each other.
    """

    num_experts: int
    intermediate_size: int
    device_name: str
    dtype: str | None = None
    block_shape: tuple[int, int] | None = None
    hidden_size: int | None = None
    top_k: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "intermediate_size", "hidden_size", "top_k", "group"):
            value = getattr(self, name)
            if value is None and name not in ("num_experts", "intermediate_size"):
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!a:.80}")
        expect_instance("device_name", self.device_name, str)
        expect_instance("dtype", self.dtype, str, optional=True)
        if not self.device_name or self.device_name != normalise_device_name(self.device_name):
            raise ValueError(f"device_name: expected a normalised device name, got {self.device_name!a:.200}")
        if self.dtype is not None and not re.fullmatch(r"[a-z0-9_]{1,32}", self.dtype):
            raise ValueError(f"dtype: expected a scheme's name or None, got {self.dtype!a:.80}")
        shape = self.block_shape
        if shape is not None and not (
            isinstance(shape, tuple) and len(shape) == 2 and all(type(size) is int and size >= 1 for size in shape)
        ):
            raise ValueError(f"block_shape: expected two integers of at least 1 or None, got {shape!a:.80}")
        if (self.hidden_size is None) != (self.top_k is None) or (self.group is not None and self.top_k is None):
            given = [name for name in ("hidden_size", "top_k", "group") if getattr(self, name) is not None]
            raise ValueError(
                f"hidden_size: expected hidden_size and top_k together, and group only beside them, got {given} alone"
            )

    @staticmethod
    def of_layer(
        *,
        num_local_experts: int,
        intermediate_size: int,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        scheme: QuantScheme,
        block_shape: tuple[int, int] | None,
        platform: Platform,
    ) -> ConfigKey | None:
        """The native key of one rank's layer; None where the platform has no name or the rank no expert.

        Raises:
            TypeError, ValueError: an argument of another type or range, by name.
        """
        expect_int("num_local_experts", num_local_experts, low=0)
        expect_instance("platform", platform, Platform)
        scheme = QuantScheme(expect_one_of("scheme", scheme, QuantScheme))
        for name, size in (("hidden_size", hidden_size), ("top_k", top_k)):
            expect_int(name, size, low=1)
        device_name = normalise_device_name(platform.name)
        if not device_name or num_local_experts < 1:
            return None
        unquantised = "float32" if dtype is torch.float32 else None
        n, k = block_shape or (0, 0)
        return ConfigKey(
            num_local_experts,
            intermediate_size,
            device_name,
            unquantised if scheme is QuantScheme.NONE else scheme.value,
            (n, k) if n and k else None,
            hidden_size,
            top_k,
            k if k and not n else None,
        )

    @property
    def is_native(self) -> bool:
        """Whether the key has what the public convention does not know."""
        return self.hidden_size is not None

    @property
    def public(self) -> ConfigKey:
        """The key in the public convention."""
        return replace(self, hidden_size=None, top_k=None, group=None)

    @property
    def file_name(self) -> str:
        """The file's name: in the public convention, or with the native fields where the key has them."""
        native = f",H={self.hidden_size},top_k={self.top_k}" if self.is_native else ""
        dtype = "" if self.dtype is None else f",dtype={self.dtype}"
        shape = "" if self.block_shape is None else f",block_shape=[{self.block_shape[0]},{self.block_shape[1]}]"
        group = "" if self.group is None else f",group={self.group}"
        return (
            f"E={self.num_experts},N={self.intermediate_size}{native},device_name={self.device_name}"
            f"{dtype}{shape}{group}.json"
        )

    @staticmethod
    def parse(file_name: str) -> ConfigKey:
        """The key that a file's name says.

        Raises:
            TypeError: no string.
            ValueError: a name of neither convention, or one that its key would not be written under.
        """
        expect_instance("file name", file_name, str)
        match = _NAME.fullmatch(file_name)
        if match is None:
            raise ValueError(f"file name: expected E=...,N=...,device_name=....json, got {file_name!a:.200}")

        def number(field: str) -> int | None:
            return None if match[field] is None else int(match[field])

        key = ConfigKey(
            int(match["E"]),
            int(match["N"]),
            match["device"],
            match["dtype"],
            None if match["n"] is None else (int(match["n"]), int(match["k"])),
            number("H"),
            number("top_k"),
            number("group"),
        )
        if key.file_name != file_name:
            raise ValueError(f"file name: expected {key.file_name!r}, got {file_name!r}, which is never looked up")
        return key

    def tune_command(self) -> str | None:
        """The command that makes the file, run on the device; None for a format that is not tuned."""
        option = _TUNED.get((self.dtype, self.block_shape, self.group))
        if option is None:
            return None
        shape = f"E={self.num_experts},N={self.intermediate_size}"
        shape += f",H={self.hidden_size},top_k={self.top_k}" if self.is_native else ""
        return f"moegate tune --shape {shape}{option}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "E": self.num_experts,
            "N": self.intermediate_size,
            "H": self.hidden_size,
            "top_k": self.top_k,
            "device_name": self.device_name,
            "dtype": self.dtype,
            "block_shape": None if self.block_shape is None else list(self.block_shape),
            "group": self.group,
        }
