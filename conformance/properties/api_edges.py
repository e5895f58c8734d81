"""API-03: what is just within the bounds is taken. A check that refuses too much is as wrong as one that lacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..judge import Verdict, declare
from ..strategies import POOLS
from .api import KINDS, good_arguments, with_scales
from .api_quantization import BASES, QUANTIZED, SMALL, Sizes
from .bad_input import Arguments, Change, mapped, put

TAKEN = declare("API-03", "a call at the edge of what is allowed raises nothing, in debug mode too", "api")


@dataclass(frozen=True)
class EdgeCall:
    """A call that must be taken.

    Attributes:
        function: the public function.
        what: the edge, in a few words.
        change: takes good keyword arguments and returns those at the edge.
        base: which good arguments it starts from, as `BadCall.base`.
    """

    function: str
    what: str
    change: Change = dict
    base: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """What a subject must declare for it."""
        return (self.function, "ExpertsQuantization") if self.base in QUANTIZED else (self.function,)

    def __str__(self) -> str:
        return "-".join(part for part in (self.function, self.base, self.what.replace(" ", "_")) if part)


def _out_beside(*, first: bool) -> Change:
    """`out` and the hidden states in one piece of memory, one right behind the other."""

    def change(good: Arguments) -> Arguments:
        hidden = good["hidden_states"]
        rows = len(hidden)
        both = hidden.repeat(2, *(1 for _ in hidden.shape[1:]))
        out, beside = (both[:rows], both[rows:]) if first else (both[rows:], both[:rows])
        return {**good, "out": out, "hidden_states": beside}

    return change


def _no_tokens(good: Arguments) -> Arguments:
    return {**good, **{name: good[name][:0] for name in ("hidden_states", "topk_weights", "topk_ids")}}


def _map_of_nothing(good: Arguments) -> Arguments:
    return {**good, "expert_map": torch.full_like(good["topk_ids"][0, :1].expand(4), -1)}


def _narrowest(good: Arguments) -> Arguments:
    return {**good, "w13": good["w13"][:, :2].contiguous(), "w2": good["w2"][..., :1].contiguous()}


EDGE_CALLS: tuple[EdgeCall, ...] = (
    *(EdgeCall(function, "as it is", base=base) for function, base in KINDS if base not in BASES),
    *(EdgeCall("fused_experts", "as it is", base=base) for base in BASES),
    *(
        EdgeCall(function, f"out right {where} its input", _out_beside(first=where == "before"))
        for function in ("fused_experts", "batched_experts")
        for where in ("before", "behind")
    ),
    EdgeCall("fused_experts", "no tokens", _no_tokens),
    EdgeCall("fused_experts", "an I of one", _narrowest),
    EdgeCall("fused_experts", "ids of -1", mapped("topk_ids", lambda ids: torch.full_like(ids, -1))),
    EdgeCall("fused_experts", "a map of nothing", _map_of_nothing),
    EdgeCall("fused_experts", "the last id", mapped("topk_ids", lambda ids: torch.full_like(ids, 3))),
    EdgeCall("batched_experts", "no tokens", mapped("expert_num_tokens", torch.zeros_like)),
    EdgeCall("batched_experts", "all tokens", mapped("expert_num_tokens", lambda counts: torch.full_like(counts, 4))),
    EdgeCall("select_experts", "every expert chosen", put(top_k=4)),
    EdgeCall("moe_align_block_size", "blocks of one", put(block_size=1)),
    EdgeCall("moe_align_block_size", "ids of -1", mapped("topk_ids", lambda ids: torch.full_like(ids, -1))),
)


def _sizes(device: str, base: str) -> Sizes:
    """Sizes of a good call; where kernels are compiled, those of other cases with such weights."""
    pools = POOLS[device]
    if not pools.is_compiled:
        return SMALL
    if base not in QUANTIZED:
        return (*pools.shapes[0], 0, 0)
    blocks, groups = pools.block_shapes, pools.group_shapes
    return {"fp8_block": blocks, "int8_group": groups, "int4": groups, "int4_zeros": groups}.get(
        base, ((*pools.scaled_shapes[0], 0, 0),)
    )[0]


def judge_edge_call(call: EdgeCall, functions: dict[str, Any], device: str) -> list[Verdict]:
    """API-03 on one call."""
    arguments = call.change(good_arguments(call.function, device, call.base, _sizes(device, call.base)))
    try:
        with functions["debug_checks"]():
            functions[call.function](**with_scales(arguments, functions))
    except Exception as error:
        return [TAKEN.verdict(False, f"{call}: {type(error).__name__}: {error}")]
    return [TAKEN.verdict(True)]
