"""PATH: the path that ran is the path that the table says. A lost fast path changes no number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..cases import ExpertsCase, LayerCase
from ..judge import Verdict, declare
from ..numerics import Numerics
from ..spec import SCHEMES, Scheme

Launches = Callable[[LayerCase], Mapping[str, tuple[Mapping[str, int], ...]]]
"""From a case to a table: by assignment (`naive`, `aligned`), and for the batched format (`batched`), the ways in which
kernels may be launched, kernel name to count."""

NAIVE = declare(
    "PATH-01",
    "naive blocks are taken exactly where there is no expert map, M * top_k * 4 <= E and no weight is grouped along K",
    "experts",
    "trace",
    "launches",
)
BACKEND = declare(
    "PATH-02", "the backend that ran is the one that was asked for, with no silent fallback", "experts", "trace"
)
LAUNCHES = declare(
    "PATH-03", "the kernels launched, and how often, are those of the path's table", "experts", "trace", "launches"
)
NOTHING = declare("PATH-04", "without tokens nothing is launched", "experts", "trace", needs=lambda can: can.empty)


def _leaves_sums_whole(scheme: Scheme) -> bool:
    """Whether its products are of fp8, and their scales multiply a GEMM's whole sum and no part of it."""
    return scheme.weight == "fp8" and not scheme.has_blocks


TILES = declare(
    "PATH-05",
    "where tiles are recorded, both are: every size of each, where they come from, and rows in common",
    "trace",
    "launches",
)
PROMOTED = declare(
    "PATH-06",
    "sums of fp8 products, where their launches say so, enter a float32 one at least as often as is declared",
    "trace",
    "launches",
    needs=lambda can: any(_leaves_sums_whole(SCHEMES[name]) for name in can.schemes),
)
TILE = ("block_size_m", "block_size_n", "block_size_k", "group_size_m", "num_warps", "num_stages")


def judge_tiles(record: Any) -> list[Verdict]:
    """PATH-05 on the record of a call; nothing where it speaks of no tile."""
    tiles = [record.last(name) for name in ("config", "config_w2")]
    if tiles == [None, None]:
        return []
    said = all(
        isinstance(tile, Mapping)
        and all(type(tile.get(name)) is int and tile[name] > 0 for name in TILE)
        and isinstance(tile.get("source"), str)
        for tile in tiles
    )
    holds = said and tiles[0]["block_size_m"] == tiles[1]["block_size_m"]
    return [TILES.verdict(holds, f"expected {', '.join(TILE)} and source of two tiles, got {tiles}")]


def judge_promotion(case: LayerCase, record: Any, numerics: Numerics) -> list[Verdict]:
    """PATH-06 on the record of a call; nothing without weights of fp8 whose scales leave a GEMM's sum whole.

    A sum that stays short is off by little on most operands, and by more the longer it is: no budget of a case that a
    suite can afford shows it.
    """
    scheme = None if case.stored is None else case.stored.scheme
    said = record.all("promoted_every")
    if scheme is None or not _leaves_sums_whole(scheme) or not said or not numerics.promoted_every:
        return []
    holds = all(type(every) is int and 0 < every <= numerics.promoted_every for every in said)
    return [PROMOTED.verdict(holds, f"expected at most {numerics.promoted_every} products, got {said}")]


def expects_naive_blocks(case: ExpertsCase) -> bool:
    """vLLM PR 39016's condition: fp8 and int8 w8a8 reach the low-latency path exactly as bf16 does."""
    grouped = case.stored is not None and case.stored.scheme.weight_scale == "group"
    return case.expert_map is None and case.num_tokens * case.top_k * 4 <= case.num_experts and not grouped


def judge_path(
    case: ExpertsCase, record: Any, variant: str, launches: Launches | None, numerics: Numerics
) -> list[Verdict]:
    """Every PATH verdict on one execution.

    Args:
        case: what ran.
        record: with `last(name)`, `all(name)` and `launches`, as `impl.path.PathRecord` has them.
        variant: the backend asked for.
        launches: the declared table, where there is one.
        numerics: declared.
    """
    launched = dict(record.launches)
    if case.num_tokens == 0:
        return [NOTHING.verdict(not launched, f"launched {launched}")]
    verdicts = [
        BACKEND.verdict(record.last("backend") == variant, f"asked for {variant}, ran {record.last('backend')}")
    ]
    table = launches(case) if launches is not None else {}
    if "naive" not in table:
        return verdicts
    expected = "naive" if expects_naive_blocks(case) else "aligned"
    taken = record.last("assignment")
    verdicts.append(
        NAIVE.verdict(
            taken == expected,
            f"M={case.num_tokens}, top_k={case.top_k}, E={case.num_experts}, map={case.expert_map is not None}: "
            f"expected {expected}, ran {taken}",
        )
    )
    verdicts.append(LAUNCHES.verdict(launched in table[expected], f"expected {table[expected]}, launched {launched}"))
    return verdicts + judge_tiles(record) + judge_promotion(case, record, numerics)
