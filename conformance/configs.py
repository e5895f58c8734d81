"""CONFIG: tuned kernel configurations that are found, checked and never silently wrong.

The file convention stands here a second time, written from its description: the suite writes public files itself and
asks whether the implementation finds and believes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, ClassVar, Protocol

from .judge import Verdict, declare
from .spec import Spec

Tile = Mapping[str, Any]
Pair = tuple[Tile, Tile]

# Shared memory in bytes that a block may use (CUDA C++ Programming Guide; AMD's architecture manuals), and how many
# threads a warp has.
DEVICES = {
    "NVIDIA H200": ("cuda:9.0", 232_448, 32),
    "NVIDIA H200 NVL": ("cuda:9.0", 232_448, 32),
    "NVIDIA H100 80GB HBM3": ("cuda:9.0", 232_448, 32),
    "NVIDIA GH200 480GB": ("cuda:9.0", 232_448, 32),
    "NVIDIA H20-3e": ("cuda:9.0", 232_448, 32),
    "NVIDIA B200": ("cuda:10.0", 232_448, 32),
    "NVIDIA A100-SXM4-80GB": ("cuda:8.0", 166_912, 32),
    "NVIDIA L40S": ("cuda:8.9", 101_376, 32),
    "NVIDIA GeForce RTX 5090": ("cuda:12.0", 101_376, 32),
    "Tesla T4": ("cuda:7.5", 65_536, 32),
    "AMD Instinct MI300X": ("rocm:gfx942", 65_536, 64),
    "Intel(R) Arc(TM) Pro B60 Graphics": ("xpu", 0, 32),
    "cpu": ("cpu", 0, 32),
}
# dtype, scheme, block_shape.
WEIGHTS = (
    ("bfloat16", "none", None),
    ("float16", "none", None),
    ("float32", "none", None),
    ("bfloat16", "fp8_w8a8", None),
    ("bfloat16", "fp8_w8a8", (128, 128)),
    ("bfloat16", "fp8_w8a8", (64, 32)),
    ("bfloat16", "int8_w8a8", None),
    ("bfloat16", "int8_w8a16", (0, 128)),
    ("bfloat16", "int4_w4a16", (0, 32)),
    ("bfloat16", "int4_w4a16", (0, 128)),
)
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_WEIGHT_BYTES = {"fp8_w8a8": 1, "int8_w8a8": 1, "int8_w8a16": 1, "int4_w4a16": 0.5}
_SCALED_ACTIVATIONS = ("fp8_w8a8", "int8_w8a8")
BLOCKS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K")


@dataclass(frozen=True)
class ConfigSpec(Spec):
    """One question to the lookup.

    Attributes:
        device: of `DEVICES`.
        M: tokens.
        E: experts of this rank, which are all experts.
        N: intermediate size of this rank.
        tokens: the keys of the file that is there, ascending.
        is_native: which form the file has.
    """

    facet: ClassVar[str] = "configs"
    is_covered: ClassVar[bool] = False

    device: str = "NVIDIA H200"
    M: int = 16
    E: int = 128
    N: int = 768
    H: int = 2048
    top_k: int = 8
    dtype: str = "bfloat16"
    scheme: str = "none"
    block_shape: tuple[int, int] | None = None
    tokens: tuple[int, ...] = (16, 64)
    is_native: bool = False


@dataclass(frozen=True)
class Found:
    """The lookup's answer in plain words.

    Attributes:
        w13, w2: the tiles, under the names that files use.
        file: the tuned file that they come from; None for the default.
        key: the file's number of tokens.
        reasons: whatever was said about the choice.
        error: the message of a refusal to read the file.
    """

    w13: Tile | None = None
    w2: Tile | None = None
    file: Path | None = None
    key: int | None = None
    reasons: tuple[str, ...] = ()
    error: str | None = None


class ConfigsFacet(Protocol):
    """What a subject's `configs()` gives."""

    def find(self, question: ConfigSpec, folder: Path, *, with_shipped: bool = False) -> Found:
        """The tiles of a layer, with `folder` as the user's folder of tuned files, beside the shipped ones or alone."""
        ...

    def write(self, folder: Path, question: ConfigSpec, tiles: Mapping[int, Pair]) -> Path:
        """Write a native tuned file for the question's layer."""
        ...

    def shipped(self) -> tuple[Path, ...]:
        """The tuned files that ship."""
        ...

    def question_of(self, file: Path) -> ConfigSpec:
        """The layer that a shipped file is for, by its name."""
        ...

    def using(self, folder: Path) -> AbstractContextManager[Any]:
        """A context in which the subject's layers read `folder`, and run the kernels that files speak of."""
        ...

    def device_name(self, device: str) -> str:
        """What a torch device calls itself in file names."""
        ...


FOUND = declare("CONFIG-01", "a file under the public convention's name is found, and its tile is what runs", "configs")
NEAREST = declare("CONFIG-02", "the key taken is the nearest number of tokens, the smaller one on a tie", "configs")
BEYOND = declare(
    "CONFIG-03", "beyond twice the largest key the default tile is used, and the reason says so", "configs"
)
ROUND_TRIP = declare(
    "CONFIG-04", "what the writer writes the lookup reads: the same file, and the same tiles for every key", "configs"
)
DEFAULT = declare(
    "CONFIG-05",
    "without a file the default tile fits kernel and device, and the reason names what was looked for",
    "configs",
)
BROKEN = declare("CONFIG-06", "a broken file is an error that names the file and the key", "configs")
CLAMPED = declare(
    "CONFIG-07",
    "a step that does not divide a block or group of scales along K is clamped and reported",
    "configs",
)
TOO_LARGE = declare(
    "CONFIG-08",
    "a tile over the device's shared memory or threads is refused, and the default runs with a reason",
    "configs",
)
SHIPPED = declare(
    "CONFIG-09",
    "every shipped file is reachable under its name, and nothing in it is clamped, refused or ignored",
    "configs",
)
HARMLESS = declare("CONFIG-10", "no tuned file changes a result beyond the budget", "configs", "experts")
OTHERS = declare("CONFIG-11", "a file for another layer, device, dtype or scale block is not taken", "configs")
SHARED = declare(
    "CONFIG-12", "bfloat16 and float16 share a file; nothing that only matters natively hides a public one", "configs"
)
ROWS = declare(
    "CONFIG-13",
    "a default tile's rows follow the batch: at most 8 times the mean pairs of an expert (or 16), at least that mean "
    "(or 64)",
    "configs",
)
USERS_FIRST = declare("CONFIG-14", "a file in the user's folder comes before the shipped one", "configs")


def public_name(question: ConfigSpec) -> str:
    """The public convention, a second time."""
    device = question.device.replace(" ", "_")
    if "H200" in device.split("_"):
        device = "NVIDIA_H200"
    name = f"E={question.E},N={question.N},device_name={device}"
    if question.scheme != "none":
        name += f",dtype={question.scheme}"
    elif question.dtype == "float32":
        name += ",dtype=float32"
    if question.block_shape is not None and all(question.block_shape):
        name += f",block_shape=[{question.block_shape[0]},{question.block_shape[1]}]"
    return name + ".json"


# block sizes M, N, K, group, warps, stages, swapped operands.
_POOL = (
    (16, 32, 16, 1, 4, 1, False),
    (16, 64, 64, 1, 4, 3, True),
    (32, 16, 32, 4, 4, 2, False),
    (32, 64, 16, 1, 8, 2, True),
    (64, 32, 64, 8, 4, 2, False),
    (128, 64, 32, 1, 8, 3, False),
)


def small_tile(number: int = 0) -> dict[str, int]:
    """Tiles that every device can run, a different one for each number."""
    n, k, group, stages = (32, 64)[number % 2], (16, 32)[number // 2 % 2], 1 + number // 8, (1, 2)[number // 4 % 2]
    return {
        "BLOCK_SIZE_M": 16,
        "BLOCK_SIZE_N": n,
        "BLOCK_SIZE_K": k,
        "GROUP_SIZE_M": group,
        "num_warps": 4,
        "num_stages": stages,
    }


def layer_tiles(seed: int, *, own_w2: bool) -> Pair:
    """Tiles for a layer that is really computed, from a pool small enough to compile; `own_w2`: one for each GEMM.

    Where both GEMMs share one it is of two kinds: each is two kernels more to compile.
    """
    pool = _POOL if own_w2 else _POOL[::3]
    first, second = pool[seed % len(pool)], pool[(seed + 1) % len(pool)]
    w13: dict[str, Any] = dict(zip((*BLOCKS, "GROUP_SIZE_M", "num_warps", "num_stages", "SWAP_AB"), first, strict=True))
    if not own_w2:
        w13.pop("SWAP_AB")
        return w13, w13
    w2 = dict(zip(w13, second, strict=True)) | {"BLOCK_SIZE_M": w13["BLOCK_SIZE_M"]}
    return w13, w2


def put_public(folder: Path, question: ConfigSpec, tiles: Mapping[int, Tile], **extra: Any) -> Path:
    """Write a public file as other engines do."""
    file = folder / public_name(question)
    file.write_text(json.dumps({**extra, **{str(tokens): tile for tokens, tile in tiles.items()}}))
    return file


def nearest(tokens: tuple[int, ...], wanted: int) -> int:
    """The key that the convention means."""
    return min(sorted(tokens), key=lambda key: abs(key - wanted))


def _same(tile: Tile | None, expected: Tile) -> bool:
    return tile is not None and all(tile.get(name) == value for name, value in expected.items())


def _misfit(question: ConfigSpec, found: Found) -> str:
    """Why the tiles found cannot run; empty where they can."""
    _, limit, warp = DEVICES[question.device]
    w13, w2 = found.w13, found.w2
    if w13 is None or w2 is None:
        return f"no tiles: {found.error}"
    if w13["BLOCK_SIZE_M"] != w2["BLOCK_SIZE_M"]:
        return f"the GEMMs share an alignment, but not BLOCK_SIZE_M: {w13}, {w2}"
    for tile in (w13, w2):
        sizes = [tile[name] for name in (*BLOCKS, "num_warps")]
        if any(size < 1 or size & (size - 1) for size in sizes):
            return f"not powers of two: {tile}"
        step, needed = tile["BLOCK_SIZE_K"], in_flight(question, tile)
        if limit and needed > limit:
            return f"needs {needed} bytes of the device's {limit}: {tile}"
        if tile["num_warps"] * warp > 1024:
            return f"too many threads: {tile}"
        k = (question.block_shape or (0, 0))[1]
        if k and k % step:
            return f"a step of {step} does not divide the scale block's {k}"
    return ""


def in_flight(question: ConfigSpec, tile: Tile) -> float:
    """Bytes of shared memory that Triton gives a tile's operands.

    A step's operands lie there for each step in flight but one; for that one too where warp-group or tensor-memory
    instructions read them there (NVIDIA's families 9, 10 and 11, rows in 64s, no float32).
    """
    rows, columns, step = (tile[name] for name in BLOCKS)
    weight = _WEIGHT_BYTES.get(question.scheme, _BYTES[question.dtype])
    activation = 1 if question.scheme in _SCALED_ACTIVATIONS else _BYTES[question.dtype]
    family = DEVICES[question.device][0].partition(".")[0]
    plain_float32 = question.scheme == "none" and question.dtype == "float32"
    in_place = family in ("cuda:9", "cuda:10", "cuda:11") and rows >= 64 and not plain_float32
    steps = tile["num_stages"] if in_place else max(1, tile["num_stages"] - 1)
    return step * (rows * activation + columns * weight) * steps


def _about(limit: int, question: ConfigSpec) -> tuple[list[Tile], list[Tile]]:
    """Tiles that just fit a device and that just do not: on either side of the limit the nearest, by their rows."""
    fits: list[Tile] = []
    too_large: list[Tile] = []
    for rows in (16, 64, 128):
        sizes = product((16, 32, 64, 128, 256), (16, 32, 64, 128, 256), range(1, 9))
        tiles = [
            small_tile() | dict(zip((*BLOCKS, "num_stages"), (rows, columns, step, stages), strict=True))
            for columns, step, stages in sizes
        ]
        tiles.sort(key=lambda tile: in_flight(question, tile))
        under = [tile for tile in tiles if in_flight(question, tile) <= limit]
        fits += under[-1:]
        too_large += tiles[len(under) :][:1]
    return fits, too_large


def judge_lookup(facet: ConfigsFacet, question: ConfigSpec, folder: Path) -> list[Verdict]:
    """Everything about one layer, its file and one number of tokens; `folder` is empty."""
    verdicts = [*_judge_default(facet, question, folder)]
    default = facet.find(question, folder)
    tiles = {tokens: small_tile(index) for index, tokens in enumerate(question.tokens)}
    if question.is_native:
        pairs = {tokens: (tile, {**tile, "num_warps": 8}) for tokens, tile in tiles.items()}
        file = facet.write(folder, question, pairs)
    else:
        pairs = {tokens: (tile, tile) for tokens, tile in tiles.items()}
        file = put_public(folder, question, tiles)
    found = facet.find(question, folder)
    largest = question.tokens[-1]
    if 2 * largest < question.M:
        is_default = (found.file, found.w13, found.w2) == (None, default.w13, default.w2)
        said = str(largest) in " ".join(found.reasons)
        verdicts.append(BEYOND.verdict(is_default and said, f"{question.M} tokens: {found}"))
    else:
        key = nearest(question.tokens, question.M)
        if not question.is_native:
            verdicts.append(
                FOUND.verdict(found.file == file, f"{file.name} is there, and {found.file} was taken: {found}")
            )
        verdicts.append(NEAREST.verdict(found.key == key, f"expected key {key} of {question.tokens}, got {found.key}"))
    for low, high in pairwise(question.tokens):
        if (low + high) % 2 == 0:  # exactly between two keys, where chance seldom comes
            at_tie = facet.find(replace(question, M=(low + high) // 2), folder)
            verdicts.append(NEAREST.verdict(at_tie.key == low, f"a tie of {low} and {high}: got {at_tie.key}"))
            break
    for tokens, (w13, w2) in pairs.items():
        at_key = facet.find(replace(question, M=tokens), folder)
        holds = at_key.file == file and at_key.key == tokens and _same(at_key.w13, w13) and _same(at_key.w2, w2)
        prop = ROUND_TRIP if question.is_native else FOUND
        verdicts.append(prop.verdict(holds, f"{file.name}, {tokens} tokens: wrote {w13}, {w2}, found {at_key}"))
    verdicts += _judge_neighbours(facet, question, folder, file)
    file.unlink()
    return verdicts


def _judge_default(facet: ConfigsFacet, question: ConfigSpec, folder: Path) -> list[Verdict]:
    found = facet.find(question, folder)
    misfit = _misfit(question, found)
    named = public_name(question) in " ".join(found.reasons)
    verdict = DEFAULT.verdict(
        found.file is None and not misfit and named,
        misfit or f"expected the default and a reason that names {public_name(question)}, got {found}",
    )
    if found.w13 is None or DEVICES[question.device][0] == "cpu":  # the interpreter's tile is one for all sizes
        return [verdict]
    rows, mean = found.w13["BLOCK_SIZE_M"], question.M * question.top_k / question.E
    fits = min(64, mean) <= rows <= max(16, 8 * mean)
    return [verdict, ROWS.verdict(fits, f"{mean:.3g} pairs an expert, tiles of {rows} rows: {question}")]


def _judge_neighbours(facet: ConfigsFacet, question: ConfigSpec, folder: Path, file: Path) -> list[Verdict]:
    """Layers that may, and that may not, take the file."""
    verdicts = []
    question = replace(question, M=question.tokens[0])
    others = [
        replace(question, E=question.E + 1),
        replace(question, N=question.N + 16),
        replace(question, device="NVIDIA H20-3e" if question.device != "NVIDIA H20-3e" else "NVIDIA L40S"),
        replace(question, dtype="bfloat16", scheme="int8_w8a8" if question.scheme != "int8_w8a8" else "fp8_w8a8"),
    ]
    if question.scheme == "none":
        others.append(replace(question, dtype="float32" if question.dtype != "float32" else "bfloat16"))
    if question.scheme == "fp8_w8a8":
        others.append(replace(question, block_shape=(32, 64)))
    if question.is_native:
        others += [replace(question, H=question.H + 64), replace(question, top_k=question.top_k + 1)]
        if question.block_shape is not None and not question.block_shape[0]:
            others.append(replace(question, block_shape=(0, 2 * question.block_shape[1])))
    for other in others:
        found = facet.find(other, folder)
        verdicts.append(OTHERS.verdict(found.file != file, f"{file.name} was taken for {other}"))
    sharing = []
    if question.scheme == "none" and question.dtype != "float32":
        sharing.append(replace(question, dtype="float16" if question.dtype == "bfloat16" else "bfloat16"))
    if not question.is_native:
        sharing += [replace(question, H=question.H + 64), replace(question, top_k=question.top_k + 1)]
        if question.device.startswith("NVIDIA H200"):
            sharing.append(replace(question, device="NVIDIA H200 NVL"))
    for other in sharing:
        found = facet.find(other, folder)
        verdicts.append(SHARED.verdict(found.file == file, f"{file.name} was not taken for {other}: {found}"))
    return verdicts


# What breaks a file, where the error must point ("" for the file as a whole), and its content.
_GOOD = small_tile()
BROKEN_FILES: dict[str, tuple[str, str | bytes]] = {
    "empty": ("", ""),
    "blank": ("", " \n"),
    "truncated": ("", json.dumps({"16": _GOOD})[:-9]),
    "not JSON": ("", "E=128"),
    "not an object": ("", "[16]"),
    "without entries": ("", '{"triton_version": "3.6.0"}'),
    "not UTF-8": ("", b'{"16": "\xff"}'),
    "a NaN": ("", '{"16": {"BLOCK_SIZE_M": NaN}}'),
    "too deep": ("", "[" * 100_000),
    "too large": ("", " " * (2 << 20) + "{}"),
    "digits without end": ("", '{"16": {"BLOCK_SIZE_M": ' + "9" * 5000 + "}}"),
    "a negative value": ("16/BLOCK_SIZE_N", json.dumps({"16": _GOOD | {"BLOCK_SIZE_N": -64}})),
    "a zero": ("16/num_warps", json.dumps({"16": _GOOD | {"num_warps": 0}})),
    "a fraction": ("16/num_stages", json.dumps({"16": _GOOD | {"num_stages": 2.5}})),
    "a string": ("16/BLOCK_SIZE_K", json.dumps({"16": _GOOD | {"BLOCK_SIZE_K": "64"}})),
    "a boolean": ("16/GROUP_SIZE_M", json.dumps({"16": _GOOD | {"GROUP_SIZE_M": True}})),
    "a null": ("16/num_warps", json.dumps({"16": _GOOD | {"num_warps": None}})),
    "no power of two": ("16/BLOCK_SIZE_N", json.dumps({"16": _GOOD | {"BLOCK_SIZE_N": 48}})),
    "a missing value": (
        "16/BLOCK_SIZE_K",
        json.dumps({"16": {name: value for name, value in _GOOD.items() if name != "BLOCK_SIZE_K"}}),
    ),
    "an unknown value": ("16/BLOCK_SIZE_Q", json.dumps({"16": _GOOD | {"BLOCK_SIZE_Q": 64}})),
    "an entry that is no object": ("16", '{"16": 64}'),
    "a key that is no number": ("sixteen", json.dumps({"sixteen": _GOOD})),
    "a key of zero": ("0", json.dumps({"0": _GOOD})),
    "a padded key": ("016", json.dumps({"016": _GOOD})),
    "a negative key": ("-16", json.dumps({"-16": _GOOD})),
    "a key twice": ("16", '{"16": ' + json.dumps(_GOOD) + ', "16": ' + json.dumps(_GOOD) + "}"),
    "a value twice": ("BLOCK_SIZE_M", '{"16": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_M": 32}}'),
    "a version that is no string": ("triton_version", json.dumps({"triton_version": 3, "16": _GOOD})),
    "a second entry that is broken": ("64/num_warps", json.dumps({"16": _GOOD, "64": _GOOD | {"num_warps": -1}})),
}
# Names in the file system that are no file to read; the suite makes them.
BROKEN_PLACES = ("a symlink loop", "a dangling link", "a folder", "a pipe")


def judge_broken(facet: ConfigsFacet, what: str, question: ConfigSpec, folder: Path) -> list[Verdict]:
    """One broken file where a layer's file should be; `folder` is empty."""
    file = folder / public_name(question)
    key = ""
    if what in BROKEN_FILES:
        key, content = BROKEN_FILES[what]
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif what == "a symlink loop":
        file.symlink_to(file)
    elif what == "a dangling link":
        file.symlink_to(folder / "nothing")
    elif what == "a folder":
        file.mkdir()
    else:
        import os

        os.mkfifo(file)
    error = facet.find(question, folder).error or ""
    holds = file.name in error and key in error
    return [BROKEN.verdict(holds, f"{what}: expected an error that names {file.name} and {key!r}, got {error!r}")]


def judge_validation(facet: ConfigsFacet, question: ConfigSpec, folder: Path) -> list[Verdict]:
    """Steps that are too long, and tiles that are too large; `folder` is empty, and no shipped file fits the layer."""
    verdicts = []
    question = replace(question, M=16)
    device, scheme, block_shape = question.device, question.scheme, question.block_shape
    default = facet.find(question, folder)
    k = (block_shape or (0, 0))[1]
    for step in (16, 32, 64, 128, 256):
        file = put_public(folder, question, {16: small_tile() | {"BLOCK_SIZE_K": step, "num_stages": 1}})
        found = facet.find(question, folder)
        runs = found.w13["BLOCK_SIZE_K"] if found.w13 else None
        if k and k % step:
            said = all(word in " ".join(found.reasons) for word in (file.name, str(step), str(runs)))
            holds = runs is not None and k % runs == 0 and runs <= k and said and found.file == file
        else:
            holds = runs == step and found.file == file
        verdicts.append(CLAMPED.verdict(holds, f"{scheme} {block_shape}, BLOCK_SIZE_K {step}: runs as {runs}, {found}"))
        file.unlink()
    _, limit, warp = DEVICES[device]
    large = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 128, "num_stages": 8}
    cases = [("num_warps", small_tile() | {"num_warps": 64}), ("num_warps", small_tile() | {"num_warps": 2048 // warp})]
    cases += [("shared memory", small_tile() | large)] if limit and not k else []
    fits, too_large = _about(limit, question) if limit and not k else ([], [])
    cases += [("shared memory", tile) for tile in too_large]
    for what, tile in cases:
        file = put_public(folder, question, {16: tile})
        found = facet.find(question, folder)
        is_default = (found.w13, found.w2) == (default.w13, default.w2) and found.file is None
        holds = is_default and file.name in " ".join(found.reasons) and what in " ".join(found.reasons)
        verdicts.append(TOO_LARGE.verdict(holds, f"{device}: {tile}: {found}"))
        file.unlink()
    for tile in (*fits, small_tile() | {"num_warps": min(16, 1024 // warp)}):
        file = put_public(folder, question, {16: tile})
        found = facet.find(question, folder)
        verdicts.append(TOO_LARGE.verdict(found.file == file, f"{device}: {tile} fits, and was refused: {found}"))
        file.unlink()
    ignored = ("SPLIT_K", "num_ctas", "waves_per_eu", "matrix_instr_nonkdim", "kpack")
    file = put_public(folder, question, {16: small_tile() | dict.fromkeys(ignored, 1)}, triton_version="3.4.0")
    found = facet.find(question, folder)
    said = all(name in " ".join(found.reasons) for name in (*ignored, "triton_version"))
    verdicts.append(FOUND.verdict(found.file == file and said, f"public keys without a use must be reported: {found}"))
    file.unlink()
    return verdicts


def judge_shipped(facet: ConfigsFacet, folder: Path) -> list[Verdict]:
    """Every key of every shipped file, on each device of its family; `folder` is an empty user's folder."""
    verdicts = []
    for file in facet.shipped():
        question = facet.question_of(file)
        family = sorted({question.device, *(device for device in DEVICES if device.startswith(question.device))})
        for device, tokens in product(family, question.tokens):
            found = facet.find(replace(question, M=tokens, device=device), folder, with_shipped=True)
            complaints = [reason for reason in found.reasons if "triton_version" not in reason]
            holds = found.file == file and found.key == tokens and not complaints and not _misfit(question, found)
            verdicts.append(SHIPPED.verdict(holds, f"{file.name}, {device}, {tokens} tokens: {found}"))
        question = replace(question, M=question.tokens[0])
        mine = facet.write(folder, question, {question.M: (small_tile(), small_tile())})
        found = facet.find(question, folder, with_shipped=True)
        verdicts.append(USERS_FIRST.verdict(found.file == mine, f"{mine} is there, and {found.file} was taken"))
        mine.unlink()
    return verdicts


def config_specs() -> Any:
    """A Hypothesis strategy for questions about one layer and its file."""
    from hypothesis import strategies as st

    tokens = st.lists(st.integers(1, 9000) | st.sampled_from((1, 2, 4, 8, 16, 64, 1024)), min_size=1, max_size=9)
    return st.builds(
        lambda weights, tokens, near, **rest: ConfigSpec(
            dtype=weights[0],
            scheme=weights[1],
            block_shape=weights[2],
            tokens=tuple(sorted(set(tokens))),
            # Around the keys, where ties and edges are.
            M=max(1, tokens[near[0] % len(tokens)] * near[1] + near[2]),
            **rest,
        ),
        weights=st.sampled_from(WEIGHTS),
        tokens=tokens,
        near=st.tuples(st.integers(0, 8), st.sampled_from((1, 1, 2, 4)), st.integers(-3, 70)),
        device=st.sampled_from(sorted(DEVICES)),
        E=st.sampled_from((1, 8, 60, 64, 128, 256, 512)),
        N=st.sampled_from((96, 192, 704, 768, 1856, 2880, 14336)),
        H=st.sampled_from((2048, 2880, 4096, 7168)),
        top_k=st.integers(1, 8),
        is_native=st.booleans(),
    ).map(lambda question: replace(question, top_k=min(question.top_k, question.E)))
