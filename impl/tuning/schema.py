"""Tuned files: what may stand in them. A file that breaks the schema is an error that names file and key.

Two forms. The public one maps token counts to one tile for both GEMMs:

    {"triton_version": "3.6.0", "16": {"BLOCK_SIZE_M": 16, ..., "num_stages": 4}}

The native one has a version and a tile for each GEMM; both tiles of an entry share BLOCK_SIZE_M, since the two GEMMs
share one alignment:

    {"format": "moegate", "version": 1, "about": {...}, "tokens": {"16": {"w13": {...}, "w2": {...}}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import json_file
from ..json_file import JsonFileError

FORMAT = "moegate"
VERSION = 1
# Tokens are counted in 32 bits.
MAX_TOKENS = 2**31 - 1

_BLOCKS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K")
# What a tile is built from, with Triton's own defaults where a file may leave one out.
_OPTIONAL = {"GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}
# Keys of public files that our kernel has no use for.
IGNORED = ("SPLIT_K", "num_ctas", "waves_per_eu", "matrix_instr_nonkdim", "kpack")
_MAY_BE_ZERO = ("num_stages", "waves_per_eu", "matrix_instr_nonkdim")
_POWERS_OF_TWO = (*_BLOCKS, "num_warps")


class TunedConfigError(JsonFileError):
    """A tuned file that cannot be believed; `file` and `key` say where (`16`, `16/w2/num_warps`)."""


@dataclass(frozen=True)
class Tile:
    """One GEMM's tile as a file gives it: of the right types, not yet known to fit kernel and device."""

    block_size_m: int
    block_size_n: int
    block_size_k: int
    group_size_m: int
    num_warps: int
    num_stages: int
    swap_ab: bool = False


@dataclass(frozen=True)
class TunedFile:
    """A tuned file that keeps the schema.

    Attributes:
        path: where it was read.
        entries: for each number of tokens, ascending, the tiles of the first and the second GEMM.
        is_native: which form it has.
        ignored: keys that were read and are not used, with where they stand.
    """

    path: Path
    entries: Mapping[int, tuple[Tile, Tile]]
    is_native: bool
    ignored: tuple[str, ...] = ()


def read_bytes(path: Path) -> bytes | None:
    """A file's bytes; None where there is none.

    Raises:
        TunedConfigError: something is there that cannot be read as a plain file of sensible size.
    """
    return json_file.read_bytes(path, TunedConfigError)


def parse(path: Path, content: bytes) -> TunedFile:
    """Check a file's content against the schema.

    Raises:
        TunedConfigError: with the key at fault.
    """
    document = json_file.parse_object(path, content, TunedConfigError)
    is_native = "format" in document
    ignored: list[str] = []
    entries = _native(path, document, ignored) if is_native else _public(path, document, ignored)
    if not entries:
        raise TunedConfigError(path, "", "expected an entry for at least one number of tokens, got none")
    return TunedFile(path, dict(sorted(entries.items())), is_native, tuple(ignored))


def _expect_object(path: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TunedConfigError(path, key, f"expected an object, got {type(value).__name__} {value!r:.40}")
    return value


def _tokens(path: Path, key: str) -> int:
    if not (key.isascii() and key.isdigit()) or str(int(key[:12])) != key or not 1 <= int(key) <= MAX_TOKENS:
        raise TunedConfigError(path, key, f"expected a number of tokens in [1, {MAX_TOKENS}]")
    return int(key)


def _public(path: Path, document: dict[str, Any], ignored: list[str]) -> dict[int, tuple[Tile, Tile]]:
    entries = {}
    for key, value in document.items():
        if key == "triton_version":
            _expect_string(path, key, value)
            ignored.append(key)
            continue
        tile = _tile(path, key, value, ignored, may_swap=False)
        entries[_tokens(path, key)] = (tile, tile)
    return entries


def _native(path: Path, document: dict[str, Any], ignored: list[str]) -> dict[int, tuple[Tile, Tile]]:
    if document["format"] != FORMAT:
        raise TunedConfigError(path, "format", f"expected {FORMAT!r}, got {document['format']!r}")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise TunedConfigError(path, "version", f"expected {VERSION}, got {document.get('version')!r}")
    for key, value in document.items():
        if key not in ("format", "version", "tokens", "about", "triton_version"):
            raise TunedConfigError(path, key, "is no key of a native file")
        if key == "triton_version":
            _expect_string(path, key, value)
            ignored.append(key)
    entries = {}
    for key, value in _expect_object(path, "tokens", document.get("tokens")).items():
        entry = _expect_object(path, key, value)
        if set(entry) != {"w13", "w2"}:
            raise TunedConfigError(path, key, f"expected the keys w13 and w2, got {sorted(entry)}")
        w13, w2 = (_tile(path, f"{key}/{gemm}", entry[gemm], ignored, may_swap=True) for gemm in ("w13", "w2"))
        if w13.block_size_m != w2.block_size_m:
            raise TunedConfigError(
                path,
                f"{key}/w2/BLOCK_SIZE_M",
                f"expected {w13.block_size_m} as in w13 (both GEMMs share one alignment), got {w2.block_size_m}",
            )
        entries[_tokens(path, key)] = (w13, w2)
    return entries


def _expect_string(path: Path, key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TunedConfigError(path, key, f"expected a string, got {type(value).__name__} {value!r:.40}")


def _tile(path: Path, key: str, value: Any, ignored: list[str], *, may_swap: bool) -> Tile:
    fields = _expect_object(path, key, value)
    swap_ab = False
    for name, number in fields.items():
        where = f"{key}/{name}"
        if may_swap and name == "SWAP_AB":
            if not isinstance(number, bool):
                raise TunedConfigError(path, where, f"expected true or false, got {number!r:.40}")
            swap_ab = number
            continue
        if name not in (*_BLOCKS, *_OPTIONAL, *IGNORED):
            raise TunedConfigError(path, where, "is no key of a tile")
        if type(number) is not int:
            raise TunedConfigError(path, where, f"expected an integer, got {type(number).__name__} {number!r:.40}")
        if number < (0 if name in _MAY_BE_ZERO else 1):
            raise TunedConfigError(path, where, f"expected at least {0 if name in _MAY_BE_ZERO else 1}, got {number}")
        if name in _POWERS_OF_TWO and number & (number - 1):
            raise TunedConfigError(path, where, f"expected a power of two, got {number}")
        if name in IGNORED:
            ignored.append(where)
    for name in _BLOCKS:
        if name not in fields:
            raise TunedConfigError(path, f"{key}/{name}", "is missing")
    ignored.extend(f"{key}/{name} left out, {value} taken" for name, value in _OPTIONAL.items() if name not in fields)
    sizes = [fields[name] for name in _BLOCKS]
    group, warps, stages = (fields.get(name, default) for name, default in _OPTIONAL.items())
    # 0 stages is how ROCm's files say that nothing is pipelined.
    return Tile(*sizes, group, warps, max(1, stages), swap_ab)
