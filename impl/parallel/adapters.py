"""Adapters of experts that several ranks share: each rank's table has those of its own, in slots that all agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch

from ..experts_module import RoutedExperts
from ..lora.table import AdapterTable
from .collectives import Group

# Characters of a rank's loaded slots that are told in full; an error names so much of them.
_TEXT = 200


def adapter_facts(adapters: AdapterTable | None) -> Mapping[str, str]:
    """What ranks must have alike of their tables, for `agree`: a token's id means its slot wherever the token comes."""
    if not isinstance(adapters, AdapterTable):
        return {"adapters": str(adapters)}
    loaded = ", ".join(_runs(adapters.loaded)) or "none"
    if len(loaded) > _TEXT:
        loaded = f"{loaded[:_TEXT]} ... ({hashlib.sha256(loaded.encode()).hexdigest()[:16]})"
    return {
        "adapters": f"{adapters.num_slots} slots of ranks up to {adapters.max_rank}" + _sharded(adapters.shards),
        "loaded slots of adapters": loaded,
    }


def _sharded(shards: Group | None) -> str:
    return "" if shards is None else f", fully sharded over {shards.size} ranks"


def _runs(slots: Sequence[int]) -> Iterator[str]:
    """Ascending numbers as `0-2`, `5`."""
    for _, run in groupby(enumerate(slots), lambda pair: pair[1] - pair[0]):
        numbers = [slot for _, slot in run]
        yield str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def expect_adapters_of_rank(
    adapters: AdapterTable | None,
    experts: RoutedExperts,
    num_experts: int,
    logical_experts: Sequence[int],
    shards: Group | None,
) -> None:
    """Check that a table holds the adapters of a rank's experts.

    Args:
        adapters: the table, or None.
        experts: of the rank.
        num_experts: E, logical.
        logical_experts: their ids, in their order.
        shards: the ranks that share the experts' columns; None where they are whole.

    Raises:
        TypeError, ValueError: `adapters`, with what differs.
    """
    if adapters is None:
        return
    if not isinstance(adapters, AdapterTable):
        raise TypeError(f"adapters: expected an AdapterTable or None, got {type(adapters).__name__}")
    if adapters.shards is not None and adapters.shards is not shards:
        whole = (
            "of whole matrices" if shards is None else f"fully sharded over the layer's `ranks.shards`, {shards.size}"
        )
        raise ValueError(f"adapters: expected a table {whole}, got one of {adapters.shards.size} ranks of another mesh")
    if adapters.num_experts != num_experts:
        raise ValueError(f"adapters: expected a table of {num_experts} experts, got {adapters.num_experts}")
    if adapters.experts != tuple(logical_experts):
        raise ValueError(
            f"adapters: expected a table of the placement's experts {list(logical_experts)} in this order, "
            f"got {list(adapters.experts)}"
        )
    like = torch.empty((0, experts.hidden_size), dtype=experts.dtype, device=experts.w2.device)
    adapters.expect_layer(experts.num_local_experts, like, experts.intermediate_size, experts.function)
