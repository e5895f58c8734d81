"""Which tiles a layer's GEMMs take: a tuned file's where one speaks, the default's otherwise, and why.

The user's folder (`MOEGATE_TUNED_CONFIG_FOLDER`) comes before the shipped one, the native name before the public one.
A file is read and validated once in a process; after that a call costs one cache look-up.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .. import replay
from ..checks import expect_bool, expect_dtype, expect_instance, expect_int, expect_one_of
from ..config import QuantScheme
from ..once import log_once
from ..platform import Platform, Vendor
from .kernel_config import KernelConfig, default_kernel_config, expect_scales, fit_block_k, override_in_force
from .limits import kernel_config, obstacle
from .names import ConfigKey
from .schema import TunedFile, parse, read_bytes

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "MOEGATE_TUNED_CONFIG_FOLDER"
SHIPPED = Path(__file__).parent / "configs"
DEFAULT = "default"

Pair = tuple[KernelConfig, KernelConfig]

_MOST_FOUND = 65_536
_found: dict[tuple[Any, ...], TunedConfigs] = {}


@dataclass(frozen=True)
class TunedConfigs:
    """The tiles of a layer's two GEMMs.

    Attributes:
        w13: of the first GEMM.
        w2: of the second; the same block_size_m, since both share one alignment.
        source: the tuned file, `default`, or `override` inside `use_kernel_configs`.
        key: the file's number of tokens that was taken; None where no file spoke.
        reasons: why these: what was looked for, what was clamped, refused or ignored.
    """

    w13: KernelConfig
    w2: KernelConfig
    source: str
    key: int | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """What the choice depends on, but for the number of tokens."""

    top_k: int
    num_experts: int
    num_local_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    scheme: QuantScheme
    block_shape: tuple[int, int] | None
    platform: Platform
    is_gated: bool

    def __post_init__(self) -> None:
        for name, low in (
            ("top_k", 1),
            ("num_experts", 1),
            ("num_local_experts", 0),
            ("hidden_size", 1),
            ("intermediate_size", 1),
        ):
            expect_int(name, getattr(self, name), low=low)
        expect_dtype("dtype", self.dtype)
        expect_instance("platform", self.platform, Platform)
        expect_bool("is_gated", self.is_gated)
        object.__setattr__(self, "scheme", QuantScheme(expect_one_of("scheme", self.scheme, QuantScheme)))
        expect_scales(self.block_shape)

    @property
    def key(self) -> ConfigKey | None:
        """The native key of its tuned file."""
        return ConfigKey.of_layer(
            num_local_experts=self.num_local_experts,
            intermediate_size=self.intermediate_size,
            hidden_size=self.hidden_size,
            top_k=self.top_k,
            dtype=self.dtype,
            scheme=self.scheme,
            block_shape=self.block_shape,
            platform=self.platform,
        )

    def default(self, num_tokens: int) -> Pair:
        """The default tiles; `default_kernel_config` says what they may raise."""
        rows = 2 * self.intermediate_size if self.is_gated else self.intermediate_size
        w13, w2 = (
            default_kernel_config(
                num_tokens=num_tokens,
                top_k=self.top_k,
                num_experts=self.num_experts,
                n=n,
                k=k,
                dtype=self.dtype,
                platform=self.platform,
                scheme=self.scheme,
                block_shape=self.block_shape,
            )
            for n, k in ((rows, self.hidden_size), (self.hidden_size, self.intermediate_size))
        )
        return w13, w2


@dataclass(frozen=True)
class _Table:
    """What a layer's file says, validated against kernel and device.

    Attributes:
        file: None where there is none.
        tokens: the file's keys, ascending.
        entries: for each key its tiles, None where the device cannot run them; with the reasons.
        reasons: of the file as a whole.
    """

    file: Path | None
    tokens: tuple[int, ...] = ()
    entries: Mapping[int, tuple[Pair | None, tuple[str, ...]]] | None = None
    reasons: tuple[str, ...] = ()


def config_folders(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where tuned files are looked for, first to last.

    Raises:
        ValueError: the variable names no folder.
    """
    named = expect_instance("environment", environment, Mapping).get(FOLDER_VARIABLE)
    if not named:
        return (SHIPPED,)
    try:
        folder = Path(named).expanduser()
        is_there = folder.is_dir()
    except (RuntimeError, ValueError, OSError):  # no such user; a NUL; a name that is too long
        is_there = False
    if not is_there:
        raise ValueError(f"{FOLDER_VARIABLE}: expected a folder, got {named!a:.300}")
    return (folder, SHIPPED)


def nearest(tokens: tuple[int, ...], num_tokens: int) -> int:
    """The key nearest by absolute difference, the smaller on a tie; `tokens` ascends and is not empty."""
    position = bisect_left(tokens, num_tokens)
    around = tokens[max(0, position - 1) : position + 1]
    return min(around, key=lambda key: (abs(key - num_tokens), key))


def find_kernel_configs(
    *,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    platform: Platform,
    num_local_experts: int | None = None,
    scheme: QuantScheme = QuantScheme.NONE,
    block_shape: tuple[int, int] | None = None,
    is_gated: bool = True,
) -> TunedConfigs:
    """The tiles of a layer's two GEMMs.

    Args:
        num_tokens: M, at least 1.
        top_k: experts a token.
        num_experts: E, over which the pairs are spread.
        hidden_size: H.
        intermediate_size: I of this rank, unpacked.
        dtype: of activations and unquantised weights.
        platform: where it runs; its name keys the files.
        num_local_experts: experts of this rank, which key the files; None where all E are.
        scheme: how weights and activations are quantised.
        block_shape: as `MoEConfig` has it.
        is_gated: w13 has 2I rows, and not I.

    Raises:
        TunedConfigError: a file that is there and breaks the schema, with file and key.
        TypeError, ValueError: an argument of another type or range, by name; `MOEGATE_TUNED_CONFIG_FOLDER` names no
            folder.
    """
    override = override_in_force()
    if override is not None:
        return TunedConfigs(*override, source="override")
    folder = os.environ.get(FOLDER_VARIABLE, "")
    question = (
        num_tokens,
        top_k,
        num_experts,
        num_experts if num_local_experts is None else num_local_experts,
        hidden_size,
        intermediate_size,
        dtype,
        scheme,
        block_shape,
        platform,
        is_gated,
        folder,
    )
    try:
        found = _found.get(question)
    except TypeError:
        found = None  # what cannot be remembered is no argument that is right: `Layer` says which
    if found is None:
        expect_int("num_tokens", num_tokens, low=1)
        if len(_found) >= _MOST_FOUND:
            _found.clear()
        found = _found[question] = _find(num_tokens, Layer(*question[1:-1]), folder)
    return found


def default_kernel_configs(
    *,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    platform: Platform,
    scheme: QuantScheme = QuantScheme.NONE,
    block_shape: tuple[int, int] | None = None,
    is_gated: bool = True,
) -> TunedConfigs:
    """The tiles of a layer's two GEMMs whatever files there are; arguments and errors as of `find_kernel_configs`."""
    override = override_in_force()
    if override is not None:
        return TunedConfigs(*override, source="override")
    layer = Layer(
        top_k,
        num_experts,
        num_experts,
        hidden_size,
        intermediate_size,
        dtype,
        scheme,
        block_shape,
        platform,
        is_gated,
    )
    expect_int("num_tokens", num_tokens, low=1)
    return TunedConfigs(*layer.default(num_tokens), DEFAULT)


def _find(num_tokens: int, layer: Layer, folder: str) -> TunedConfigs:
    table = _table(layer, folder)
    if table.file is None:
        return TunedConfigs(*layer.default(num_tokens), DEFAULT, None, table.reasons)
    largest = table.tokens[-1]
    if num_tokens > 2 * largest:
        reason = f"{table.file} ends at {largest} tokens: beyond twice as many the default tiles are used"
        log_once(logger, logging.WARNING, reason)
        return TunedConfigs(*layer.default(num_tokens), DEFAULT, None, (*table.reasons, reason))
    key = nearest(table.tokens, num_tokens)
    pair, reasons = (table.entries or {})[key]
    if pair is None:
        return TunedConfigs(*layer.default(num_tokens), DEFAULT, None, (*table.reasons, *reasons))
    return TunedConfigs(*pair, str(table.file), key, (*table.reasons, *reasons))


@lru_cache(maxsize=1024)
def _table(layer: Layer, folder: str) -> _Table:
    """Find, read and validate a layer's file.

    Raises:
        TunedConfigError: the file breaks the schema.
    """
    key = layer.key
    if key is None:
        return _Table(None, reasons=("no tuned file is looked for: the device has no name, or the rank no expert",))
    folders = config_folders({FOLDER_VARIABLE: folder})
    for place in folders:
        for name in (key.file_name, key.public.file_name):
            content = read_bytes(place / name)
            if content is not None:
                return _validated(parse(place / name, content), layer)
    where = " and ".join(str(place) for place in folders)
    command = key.tune_command()
    reason = f"no tuned file {key.file_name} or {key.public.file_name} in {where}: the default tiles are used"
    if command is not None:
        reason += f"; to make one: {command}"
    if layer.platform.vendor in (Vendor.NVIDIA, Vendor.AMD, Vendor.INTEL):
        log_once(logger, logging.WARNING, reason)
    return _Table(None, reasons=(reason,))


def _validated(file: TunedFile, layer: Layer) -> _Table:
    entries: dict[int, tuple[Pair | None, tuple[str, ...]]] = {}
    clamped, refused = [], []
    for tokens, tiles in file.entries.items():
        pair, changes, problem = [], [], None
        for gemm, tile in zip(("w13", "w2"), tiles, strict=True):
            fitted = fit_block_k(tile, layer.block_shape)
            where = f"key {tokens}" + (f" {gemm}" if file.is_native else "")
            if fitted is not tile:
                changes.append(f"{where}: BLOCK_SIZE_K {tile.block_size_k} runs as {fitted.block_size_k}")
            try:
                config = kernel_config(fitted)
                problem = problem or obstacle(config, layer.dtype, layer.scheme, layer.platform)
                pair.append(config)
            except ValueError as error:
                problem = problem or f"the kernel does not take it: {error}"
        changes = list(dict.fromkeys(changes))
        if problem is not None:
            refused.append(f"key {tokens}: {problem}")
            entries[tokens] = (None, (f"{file.path}, key {tokens}: {problem}; the default tiles are used",))
        else:
            clamped += changes
            entries[tokens] = ((pair[0], pair[1]), tuple(f"{file.path}, {change}" for change in changes))
    if clamped:
        k = (layer.block_shape or (0, 0))[1]
        log_once(
            logger,
            logging.WARNING,
            f"{file.path}: BLOCK_SIZE_K must divide the scale block's {k} columns: {'; '.join(clamped)}",
        )
    if refused:
        log_once(
            logger, logging.WARNING, f"{file.path}: refused, the default tiles are used instead: {'; '.join(refused)}"
        )
    reasons = ()
    if file.ignored:
        reasons = (f"{file.path}: ignored {', '.join(file.ignored)}",)
        log_once(logger, logging.INFO, reasons[0])
    return _Table(file.path, tuple(file.entries), entries, reasons)


def forget() -> None:
    """Forget every file that was read, and what was launched for it (tests, and after a search has written one)."""
    replay.forget()
    _found.clear()
    _table.cache_clear()
