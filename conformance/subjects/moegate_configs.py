"""moegate's lookup of tuned kernel configurations, asked in the suite's plain words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from ...impl.config import QuantScheme
from ...impl.experts.kernel_form import FormChoice, use_kernel_forms
from ...impl.platform import Platform
from ...impl.tuning import lookup
from ...impl.tuning.kernel_config import KernelConfig
from ...impl.tuning.lookup import FOLDER_VARIABLE, find_kernel_configs
from ...impl.tuning.names import ConfigKey, normalise_device_name
from ...impl.tuning.schema import TunedConfigError
from ...impl.tuning.writer import read_tuned_file, write_tuned_file
from ..configs import DEVICES, ConfigSpec, Found, Pair, Tile


def _platform(question: ConfigSpec) -> Platform:
    return replace(Platform.parse(DEVICES[question.device][0]), name=question.device)


def _plain(config: KernelConfig) -> dict[str, int | bool]:
    return {
        "BLOCK_SIZE_M": config.block_size_m,
        "BLOCK_SIZE_N": config.block_size_n,
        "BLOCK_SIZE_K": config.block_size_k,
        "GROUP_SIZE_M": config.group_size_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "SWAP_AB": config.swap_ab,
    }


def _kernel_config(tile: Tile) -> KernelConfig:
    return KernelConfig(
        tile["BLOCK_SIZE_M"],
        tile["BLOCK_SIZE_N"],
        tile["BLOCK_SIZE_K"],
        tile["GROUP_SIZE_M"],
        tile["num_warps"],
        tile["num_stages"],
        tile.get("SWAP_AB", False),
    )


class MoegateConfigs:
    """`find_kernel_configs` and `write_tuned_file`."""

    def find(self, question: ConfigSpec, folder: Path, *, with_shipped: bool = False) -> Found:
        """The lookup with `folder` as the user's; nothing is remembered from an earlier call."""
        shipped = lookup.SHIPPED if with_shipped else folder
        with mock.patch.object(lookup, "SHIPPED", shipped), self.using(folder):
            try:
                found = find_kernel_configs(
                    num_tokens=question.M,
                    top_k=question.top_k,
                    num_experts=question.E,
                    hidden_size=question.H,
                    intermediate_size=question.N,
                    dtype=getattr(torch, question.dtype),
                    platform=_platform(question),
                    scheme=QuantScheme(question.scheme),
                    block_shape=question.block_shape,
                )
            except TunedConfigError as error:
                return Found(error=str(error))
        file = None if found.source == lookup.DEFAULT else Path(found.source)
        return Found(_plain(found.w13), _plain(found.w2), file, found.key, found.reasons)

    def write(self, folder: Path, question: ConfigSpec, tiles: Mapping[int, Pair]) -> Path:
        """A native file of the question's layer."""
        key = ConfigKey.of_layer(
            num_local_experts=question.E,
            intermediate_size=question.N,
            hidden_size=question.H,
            top_k=question.top_k,
            dtype=getattr(torch, question.dtype),
            scheme=QuantScheme(question.scheme),
            block_shape=question.block_shape,
            platform=_platform(question),
        )
        if key is None:
            raise ValueError(f"question: expected a device with a name and an expert, got {question}")
        pairs = {tokens: (_kernel_config(w13), _kernel_config(w2)) for tokens, (w13, w2) in tiles.items()}
        return write_tuned_file(folder, key, pairs)

    def shipped(self) -> tuple[Path, ...]:
        """Every JSON file in the package's folder."""
        return tuple(sorted(lookup.SHIPPED.glob("*.json")))

    def question_of(self, file: Path) -> ConfigSpec:
        """The layer that a file's name says, with the tokens that it holds.

        Raises:
            ValueError: a name that is never looked up, or a device that the suite does not know.
        """
        key = ConfigKey.parse(file.name)
        known = {normalise_device_name(name): name for name in reversed(DEVICES)}
        if key.device_name not in known:
            raise ValueError(f"{file.name}: expected a device of {sorted(known)}")
        scheme = key.dtype if key.dtype in tuple(QuantScheme) else "none"
        content = read_tuned_file(file)
        return ConfigSpec(
            device=known[key.device_name],
            E=key.num_experts,
            N=key.intermediate_size,
            H=key.hidden_size or 2048,
            top_k=key.top_k or 1,
            dtype="float32" if key.dtype == "float32" else "bfloat16",
            scheme=scheme or "none",
            block_shape=(0, key.group) if key.group else key.block_shape,
            tokens=() if content is None else tuple(content.entries),
            is_native=key.is_native,
        )

    @contextmanager
    def using(self, folder: Path) -> Iterator[None]:
        """Layers inside this block read tuned files from `folder`, and run the kernels whose tiles these give.

        On Hopper prefill has other kernels, faster than the best of these tiles, which no file speaks of.
        """
        before = os.environ.get(FOLDER_VARIABLE)
        os.environ[FOLDER_VARIABLE] = str(folder)
        lookup.forget()
        try:
            with use_kernel_forms(FormChoice.GENERAL):
                yield
        finally:
            os.environ.pop(FOLDER_VARIABLE)
            if before is not None:
                os.environ[FOLDER_VARIABLE] = before
            lookup.forget()

    def device_name(self, device: str) -> str:
        """The platform's name."""
        return Platform.of(device).name
