"""API: bad input gets an error that names the argument, before anything is launched or written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..judge import Verdict, declare
from .api_quantization import BAD_EXPERTS_CALLS, QUANTIZED, SMALL, Sizes, quantized_arguments
from .api_routing import BAD_ROUTING
from .bad_input import (
    Arguments,
    Bad,
    BoolKind,
    Change,
    ChoiceKind,
    Contents,
    IntKind,
    Kind,
    NumberKind,
    ObjectKind,
    TensorKind,
    bad_arguments,
    mapped,
    on_meta,
    put,
    refusal_of,
)

NAMED = declare("API-01", "bad input raises an error that names the argument, what was expected and what came", "api")
UNTOUCHED = declare("API-02", "a refused call leaves its inputs as they were", "api")


@dataclass(frozen=True)
class BadCall:
    """A call that must be refused.

    Attributes:
        function: the public function.
        argument: what the message must name.
        what: what is wrong with it, in a few words.
        change: takes good keyword arguments and returns bad ones.
        debug: only the checks that synchronise the device can see it.
        base: which good arguments it starts from: of `quantized_arguments`, or "" for plain ones.
    """

    function: str
    argument: str
    what: str
    change: Change
    debug: bool = False
    base: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """What a subject must declare for it: the function, and the scales' class."""
        return (self.function, "ExpertsQuantization") if self.base in QUANTIZED else (self.function,)

    def __str__(self) -> str:
        base = f"-{self.base}" if self.base else ""
        return f"{self.function}{base}-{Bad(self.argument, self.what, self.change)}"


def good_arguments(function: str, device: str, base: str = "", sizes: Sizes = SMALL) -> Arguments:
    """Arguments that the function accepts, of these sizes; `quant` as the fields of an `ExpertsQuantization`."""
    if base == "groups":
        return good_arguments(function, device) | {"num_expert_group": 2, "topk_group": 1, "group_ranking": "max"}
    if base:
        return good_arguments(function, device, "", sizes) | quantized_arguments(base, device, sizes)
    m, e, k = 4, 4, 2
    h, i, _, _ = sizes

    def full(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.full(shape, 0.125, dtype=dtype, device=device)

    ids = torch.arange(m * k, device=device, dtype=torch.int32).view(m, k) % e
    if function == "fused_experts":
        return {
            "hidden_states": full(m, h),
            "w13": full(e, 2 * i, h),
            "w2": full(e, h, i),
            "topk_weights": full(m, k, dtype=torch.float32),
            "topk_ids": ids,
        }
    if function == "select_experts":
        return {"router_logits": full(m, e, dtype=torch.float32), "top_k": k}
    if function == "batched_experts":
        return {
            "hidden_states": full(e, m, h),
            "w13": full(e, 2 * i, h),
            "w2": full(e, h, i),
            "expert_num_tokens": torch.full((e,), 1, device=device, dtype=torch.int32),
            "backend": "triton",  # the format's only one: a CPU has no other
        }
    return {"topk_ids": ids, "block_size": 16, "num_experts": e}


_EXPERTS: dict[str, Kind] = {
    **dict.fromkeys(("hidden_states", "w13", "w2"), TensorKind()),
    "activation": ChoiceKind(),
    "swiglu_alpha": NumberKind(),
    "swiglu_limit": NumberKind(),
    "interleaved": BoolKind(),
    "quant": ObjectKind(optional=True),
    "adapters": ObjectKind(optional=True),
    "allow_tf32": BoolKind(),
    "dp_size": IntKind(1),
}
# What each function's arguments may be, by the good arguments that they are made from.
KINDS: dict[tuple[str, str], dict[str, Kind]] = {
    ("fused_experts", ""): {
        **_EXPERTS,
        "topk_weights": TensorKind(),
        "topk_ids": TensorKind(),
        "global_num_experts": IntKind(1, 4, optional=True),
        "apply_router_weight_on_input": BoolKind(),
        "backend": ChoiceKind(),
    },
    ("fused_experts", "optional"): dict.fromkeys(("expert_map", "w13_bias", "w2_bias", "out"), TensorKind(True)),
    ("batched_experts", ""): {**_EXPERTS, "expert_num_tokens": TensorKind(), "backend": ChoiceKind(optional=True)},
    ("select_experts", ""): {
        "router_logits": TensorKind(),
        "top_k": IntKind(1, 4),
        "scoring_func": ChoiceKind(),
        "renormalize": BoolKind(),
        "routed_scaling_factor": NumberKind(),
        "custom_routing_function": ObjectKind(optional=True),
        "backend": ChoiceKind(optional=True),
    },
    ("select_experts", "groups"): {
        "num_expert_group": IntKind(1, 4),
        "topk_group": IntKind(1, 2),
        "group_ranking": ChoiceKind(optional=True),
    },
    ("moe_align_block_size", ""): {
        "topk_ids": TensorKind(),
        "block_size": IntKind(1, 1024),
        "num_experts": IntKind(1),
    },
}


def _generated() -> list[BadCall]:
    return [
        BadCall(function, bad.argument, bad.what, bad.change, bad.debug, base)
        for (function, base), kinds in KINDS.items()
        for bad in bad_arguments(kinds)
    ]


def _expert_map(*values: int) -> Change:
    return lambda good: {**good, "expert_map": torch.tensor(values, dtype=torch.int32, device=good["topk_ids"].device)}


def _pairs_without_end(good: Arguments) -> Arguments:
    """More pairs than are counted in 32 bits, in no memory."""
    many = {name: good[name][:1].expand(2**31, -1) for name in ("hidden_states", "topk_weights", "topk_ids")}
    return {**good, **many}


BAD_CALLS: tuple[BadCall, ...] = (
    *_generated(),
    BadCall("fused_experts", "w13", "has another H", mapped("w13", lambda t: t[..., :-8].contiguous())),
    BadCall("fused_experts", "w13", "has odd rows", mapped("w13", lambda t: t[:, :-1])),
    BadCall("fused_experts", "w13", "has another E", mapped("w13", lambda t: t[:-1])),
    BadCall("fused_experts", "w13", "has another dtype", mapped("w13", lambda t: t.half())),
    BadCall("fused_experts", "w13", "is on another device", mapped("w13", on_meta)),
    BadCall("fused_experts", "w2", "has another H", mapped("w2", lambda t: t[:, :-1])),
    BadCall("fused_experts", "w2", "has another dtype", mapped("w2", lambda t: t.float())),
    BadCall("fused_experts", "w2", "is on another device", mapped("w2", on_meta)),
    BadCall("fused_experts", "topk_weights", "has another M", mapped("topk_weights", lambda t: t[:-1])),
    BadCall("fused_experts", "topk_weights", "has another top_k", mapped("topk_weights", lambda t: t[:, :1])),
    BadCall("fused_experts", "topk_weights", "is bfloat16", mapped("topk_weights", lambda t: t.bfloat16())),
    BadCall("fused_experts", "topk_weights", "is on another device", mapped("topk_weights", on_meta)),
    BadCall(
        "fused_experts", "topk_weights", "has a NaN", mapped("topk_weights", lambda t: t * float("nan")), debug=True
    ),
    BadCall("fused_experts", "topk_ids", "has another M", mapped("topk_ids", lambda t: t[:-1])),
    BadCall("fused_experts", "topk_ids", "is int16", mapped("topk_ids", lambda t: t.short())),
    BadCall("fused_experts", "topk_ids", "is on another device", mapped("topk_ids", on_meta)),
    BadCall("fused_experts", "topk_ids", "has an id of E", mapped("topk_ids", lambda t: t + 3), debug=True),
    BadCall("fused_experts", "topk_ids", "has an id of -2", mapped("topk_ids", lambda t: t - 2), debug=True),
    BadCall(
        "fused_experts",
        "topk_ids",
        "has top_k above E",
        lambda good: {
            **good,
            "topk_ids": good["topk_ids"].repeat(1, 3),
            "topk_weights": good["topk_weights"].repeat(1, 3),
        },
    ),
    BadCall(
        "fused_experts",
        "topk_ids",
        "has top_k of 0",
        lambda good: {**good, "topk_ids": good["topk_ids"][:, :0], "topk_weights": good["topk_weights"][:, :0]},
    ),
    BadCall("fused_experts", "expert_map", "has two dimensions", put(expert_map=torch.zeros(2, 2, dtype=torch.int32))),
    BadCall("fused_experts", "expert_map", "is int64", lambda good: {**good, "expert_map": torch.arange(4)}),
    BadCall(
        "fused_experts",
        "expert_map",
        "has the wrong length",
        lambda good: {**_expert_map(0, 1, 2)(good), "global_num_experts": 4},
    ),
    BadCall("fused_experts", "expert_map", "uses a local id twice", _expert_map(0, 1, 1, 2), debug=True),
    BadCall("fused_experts", "expert_map", "has a local id out of range", _expert_map(0, 1, 2, 4), debug=True),
    BadCall("fused_experts", "global_num_experts", "is not the number of experts", put(global_num_experts=9)),
    BadCall("fused_experts", "apply_router_weight_on_input", "needs top_k 1", put(apply_router_weight_on_input=True)),
    BadCall(
        "fused_experts", "out", "has another shape", lambda good: {**good, "out": good["hidden_states"][:-1].clone()}
    ),
    BadCall("fused_experts", "out", "has another dtype", lambda good: {**good, "out": good["hidden_states"].float()}),
    BadCall("fused_experts", "out", "overlaps an input", lambda good: {**good, "out": good["hidden_states"]}),
    BadCall(
        "fused_experts", "out", "is on another device", lambda good: {**good, "out": on_meta(good["hidden_states"])}
    ),
    BadCall("batched_experts", "w13", "has odd rows", mapped("w13", lambda t: t[:, :-1])),
    BadCall("batched_experts", "w2", "has another E", mapped("w2", lambda t: t[:-1])),
    BadCall("batched_experts", "expert_num_tokens", "has another E", mapped("expert_num_tokens", lambda t: t[:-1])),
    BadCall("batched_experts", "expert_num_tokens", "is int64", mapped("expert_num_tokens", lambda t: t.long())),
    BadCall("batched_experts", "expert_num_tokens", "is on another device", mapped("expert_num_tokens", on_meta)),
    BadCall(
        "batched_experts",
        "expert_num_tokens",
        "is above max_tokens",
        mapped("expert_num_tokens", lambda t: t + 4),
        True,
    ),
    BadCall("batched_experts", "expert_num_tokens", "is negative", mapped("expert_num_tokens", lambda t: t - 2), True),
    BadCall("batched_experts", "out", "overlaps an input", lambda good: {**good, "out": good["hidden_states"]}),
    BadCall(
        "batched_experts", "out", "has another shape", lambda good: {**good, "out": good["hidden_states"][:-1].clone()}
    ),
    BadCall("moe_align_block_size", "block_size", "is no power of two", put(block_size=24)),
    BadCall("moe_align_block_size", "topk_ids", "has an id of E", mapped("topk_ids", lambda t: t + 3), debug=True),
    BadCall("moe_align_block_size", "expert_map", "has the wrong length", _expert_map(0, 1, 2)),
    BadCall("moe_align_block_size", "expert_map", "uses a local id twice", _expert_map(0, 1, 1, 2), debug=True),
    BadCall("moe_align_block_size", "topk_ids", "has top_k of 0", mapped("topk_ids", lambda t: t[:, :0])),
    BadCall(
        "fused_experts",
        "topk_weights",
        "is sparse and has one column",
        lambda good: {
            **good,
            "topk_weights": good["topk_weights"][:, :1].to_sparse(),
            "topk_ids": good["topk_ids"][:, :1],
        },
    ),
    BadCall("fused_experts", "topk_ids", "has more pairs than 32 bits count", _pairs_without_end),
    BadCall(
        "moe_align_block_size",
        "topk_ids",
        "has more pairs than 32 bits count",
        mapped("topk_ids", lambda t: t[:1].expand(2**31, -1)),
    ),
    BadCall(
        "batched_experts",
        "hidden_states",
        "has more rows than 32 bits count",
        mapped("hidden_states", lambda t: t[:, :1].expand(-1, 2**31, -1)),
    ),
    BadCall(
        "fused_experts",
        "out",
        "has rows that overlap",
        lambda good: {**good, "out": good["hidden_states"][:1].clone().expand(4, -1)},
    ),
    *(BadCall("select_experts", bad.argument, bad.what, bad.change, bad.debug) for bad in BAD_ROUTING),
    *(BadCall(*call) for call in BAD_EXPERTS_CALLS),
)


def with_scales(arguments: Arguments, functions: dict[str, Any]) -> Arguments:
    """The arguments with the subject's own value in place of the fields of its scales."""
    fields = arguments.get("quant")
    if not isinstance(fields, dict) or "scheme" not in fields:
        return arguments
    return arguments | {"quant": functions["ExpertsQuantization"](**fields)}


def judge_bad_call(call: BadCall, functions: dict[str, Any], device: str) -> list[Verdict]:
    """API-01 and 02 on one bad call."""
    bad = call.change(good_arguments(call.function, device, call.base))
    contents = Contents(bad)

    def run() -> None:
        with functions["debug_checks"](call.debug):
            functions[call.function](**with_scales(bad, functions))

    wrong = refusal_of(run, call.argument)
    changed = contents.changed()
    return [NAMED.verdict(not wrong, f"{call}: {wrong}"), UNTOUCHED.verdict(not changed, f"{call}: changed {changed}")]
