"""Write tuned files: whole or not at all, and under the very name that the lookup reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checks import expect_instance, expect_int, shown
from ..whole_file import write_whole
from .kernel_config import KernelConfig
from .names import ConfigKey
from .schema import FORMAT, MAX_TOKENS, VERSION, TunedFile, parse, read_bytes


def _tile(config: KernelConfig) -> dict[str, Any]:
    tile: dict[str, Any] = {
        "BLOCK_SIZE_M": config.block_size_m,
        "BLOCK_SIZE_N": config.block_size_n,
        "BLOCK_SIZE_K": config.block_size_k,
        "GROUP_SIZE_M": config.group_size_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return tile | {"SWAP_AB": True} if config.swap_ab else tile


def dump(
    key: ConfigKey,
    configs: Mapping[int, tuple[KernelConfig, KernelConfig]],
    *,
    triton_version: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> str:
    """A tuned file's text, in the form that its key has.

    Args:
        key: native, or public (`ConfigKey.public`).
        configs: for each number of tokens the tiles of the first and the second GEMM.
        triton_version: with which the tiles were measured.
        about: how they were found; plain data, kept in native files alone.

    Raises:
        TypeError: an argument of another type, by name.
        ValueError: no entry, or one that is none; an `about` that is no JSON; a public key with tiles that the public
            form cannot hold (one for each GEMM, swapped operands, about).
    """
    expect_instance("key", key, ConfigKey)
    expect_instance("triton_version", triton_version, str, optional=True)
    expect_instance("about", about, Mapping, optional=True)
    if not expect_instance("configs", configs, Mapping):
        raise ValueError("configs: expected at least one number of tokens, got none")
    for tokens, pair in configs.items():
        expect_int("configs' number of tokens", tokens, low=1, high=MAX_TOKENS)
        if not (isinstance(pair, tuple) and [type(tile) for tile in pair] == [KernelConfig, KernelConfig]):
            raise TypeError(f"configs[{tokens}]: expected the tiles of two GEMMs, got {shown(pair)}")
    ordered = sorted(configs.items())
    document: dict[str, Any] = {} if triton_version is None else {"triton_version": triton_version}
    if key.is_native:
        document = {"format": FORMAT, "version": VERSION} | document
        document |= {} if about is None else {"about": dict(about)}
        document["tokens"] = {str(tokens): {"w13": _tile(w13), "w2": _tile(w2)} for tokens, (w13, w2) in ordered}
        try:
            return json.dumps(document, indent=2, sort_keys=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ValueError(f"about: expected plain data, got something else: {error}") from None
    for tokens, (w13, w2) in ordered:
        if w13 != w2 or w13.swap_ab or about is not None:
            raise ValueError(
                f"configs: expected one tile for both GEMMs, unswapped, in the public form, got {w13} and {w2} "
                f"for {tokens} tokens"
            )
    document |= {str(tokens): _tile(w13) for tokens, (w13, _) in ordered}
    return json.dumps(document, indent=4) + "\n"


def write_tuned_file(
    folder: Path | str,
    key: ConfigKey,
    configs: Mapping[int, tuple[KernelConfig, KernelConfig]],
    *,
    triton_version: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a tuned file; an interruption leaves the old one, or none.

    Arguments are those of `dump`; the folder is made where there is none.

    Returns:
        The file, under the name that `find_kernel_configs` looks for.

    Raises:
        ValueError: as `dump`; tiles that the lookup would refuse to read (`TunedConfigError`).
        OSError: the folder cannot be written.
    """
    expect_instance("key", key, ConfigKey)
    target = Path(folder) / key.file_name
    text = dump(key, configs, triton_version=triton_version, about=about)
    parse(target, text.encode())
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(target, text)


def read_tuned_file(path: Path | str) -> TunedFile | None:
    """A tuned file as it stands, for a search that goes on where one stopped; None where there is none.

    Raises:
        TunedConfigError: it breaks the schema.
    """
    path = Path(path)
    content = read_bytes(path)
    return None if content is None else parse(path, content)
