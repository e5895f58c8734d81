"""API: bad input gets an error that names the argument, before anything is launched or written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..judge import Verdict, declare
from .api_quantization import BAD_EXPERTS_CALLS, quantized_arguments

NAMED = declare("API-01", "bad input raises ValueError or TypeError with a message that names the argument", "api")
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
    change: Callable[[dict[str, Any]], dict[str, Any]]
    debug: bool = False
    base: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """What a subject must declare for it: the function, and the scales' class."""
        return (self.function, "ExpertsQuantization") if self.base else (self.function,)

    def __str__(self) -> str:
        base = f"-{self.base}" if self.base else ""
        return f"{self.function}{base}-{self.argument}-{self.what}".replace(" ", "_")


def good_arguments(function: str, device: str, base: str = "") -> dict[str, Any]:
    """Arguments that the function accepts; `quant` as the fields of an `ExpertsQuantization`."""
    if base:
        return good_arguments(function, device) | quantized_arguments(base, device)
    m, h, i, e, k = 4, 32, 16, 4, 2

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


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda good: {**good, name: value}


def _map(name: str, function: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda good: {**good, name: function(good[name])}


def _expert_map(*values: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda good: {**good, "expert_map": torch.tensor(values, dtype=torch.int32, device=good["topk_ids"].device)}


def _strided_columns(t: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(2, dim=-1)[..., ::2]


def _bad_tensors(function: str, names: tuple[str, ...]) -> list[BadCall]:
    calls = []
    for name in names:
        calls += [
            BadCall(function, name, "is None", _set(name, None)),
            BadCall(function, name, "is a list", _map(name, lambda t: t.tolist())),
            BadCall(function, name, "has one dimension too few", _map(name, lambda t: t[0])),
            BadCall(function, name, "has one dimension too many", _map(name, lambda t: t[None])),
            BadCall(function, name, "is float64", _map(name, lambda t: t.double())),
            BadCall(function, name, "is complex", _map(name, lambda t: t.to(torch.complex64))),
            BadCall(function, name, "has strided columns", _map(name, _strided_columns)),
        ]
    return calls


def _on_meta(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(t, device="meta")


BAD_CALLS: tuple[BadCall, ...] = (
    *_bad_tensors("fused_experts", ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")),
    *_bad_tensors("select_experts", ("router_logits",)),
    *_bad_tensors("moe_align_block_size", ("topk_ids",)),
    *_bad_tensors("batched_experts", ("hidden_states", "w13", "w2", "expert_num_tokens")),
    BadCall("fused_experts", "w13", "has another H", _map("w13", lambda t: t[..., :-8].contiguous())),
    BadCall("fused_experts", "w13", "has odd rows", _map("w13", lambda t: t[:, :-1])),
    BadCall("fused_experts", "w13", "has another E", _map("w13", lambda t: t[:-1])),
    BadCall("fused_experts", "w13", "has another dtype", _map("w13", lambda t: t.half())),
    BadCall("fused_experts", "w13", "is on another device", _map("w13", _on_meta)),
    BadCall("fused_experts", "w2", "has another H", _map("w2", lambda t: t[:, :-1])),
    BadCall("fused_experts", "w2", "has another dtype", _map("w2", lambda t: t.float())),
    BadCall("fused_experts", "w2", "is on another device", _map("w2", _on_meta)),
    BadCall("fused_experts", "topk_weights", "has another M", _map("topk_weights", lambda t: t[:-1])),
    BadCall("fused_experts", "topk_weights", "has another top_k", _map("topk_weights", lambda t: t[:, :1])),
    BadCall("fused_experts", "topk_weights", "is bfloat16", _map("topk_weights", lambda t: t.bfloat16())),
    BadCall("fused_experts", "topk_weights", "is on another device", _map("topk_weights", _on_meta)),
    BadCall("fused_experts", "topk_weights", "has a NaN", _map("topk_weights", lambda t: t * float("nan")), debug=True),
    BadCall("fused_experts", "topk_ids", "has another M", _map("topk_ids", lambda t: t[:-1])),
    BadCall("fused_experts", "topk_ids", "is int16", _map("topk_ids", lambda t: t.short())),
    BadCall("fused_experts", "topk_ids", "is on another device", _map("topk_ids", _on_meta)),
    BadCall("fused_experts", "topk_ids", "has an id of E", _map("topk_ids", lambda t: t + 3), debug=True),
    BadCall("fused_experts", "topk_ids", "has an id of -2", _map("topk_ids", lambda t: t - 2), debug=True),
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
    BadCall("fused_experts", "expert_map", "is a list", _set("expert_map", [0, 1, 2, 3])),
    BadCall(
        "fused_experts", "expert_map", "has two dimensions", _set("expert_map", torch.zeros(2, 2, dtype=torch.int32))
    ),
    BadCall("fused_experts", "expert_map", "is int64", lambda good: {**good, "expert_map": torch.arange(4)}),
    BadCall(
        "fused_experts",
        "expert_map",
        "has the wrong length",
        lambda good: {**_expert_map(0, 1, 2)(good), "global_num_experts": 4},
    ),
    BadCall("fused_experts", "expert_map", "uses a local id twice", _expert_map(0, 1, 1, 2), debug=True),
    BadCall("fused_experts", "expert_map", "has a local id out of range", _expert_map(0, 1, 2, 4), debug=True),
    BadCall("fused_experts", "global_num_experts", "is 0", _set("global_num_experts", 0)),
    BadCall("fused_experts", "global_num_experts", "is negative", _set("global_num_experts", -4)),
    BadCall("fused_experts", "global_num_experts", "is not the number of experts", _set("global_num_experts", 9)),
    BadCall("fused_experts", "global_num_experts", "is a float", _set("global_num_experts", 4.0)),
    BadCall("fused_experts", "activation", "is unknown", _set("activation", "tanh")),
    BadCall("fused_experts", "activation", "is None", _set("activation", None)),
    BadCall(
        "fused_experts", "apply_router_weight_on_input", "needs top_k 1", _set("apply_router_weight_on_input", True)
    ),
    BadCall("fused_experts", "apply_router_weight_on_input", "is an int", _set("apply_router_weight_on_input", 1)),
    BadCall("fused_experts", "backend", "is unknown", _set("backend", "fastest")),
    BadCall("fused_experts", "backend", "is None", _set("backend", None)),
    BadCall("fused_experts", "allow_tf32", "is a string", _set("allow_tf32", "yes")),
    BadCall(
        "fused_experts", "out", "has another shape", lambda good: {**good, "out": good["hidden_states"][:-1].clone()}
    ),
    BadCall("fused_experts", "out", "has another dtype", lambda good: {**good, "out": good["hidden_states"].float()}),
    BadCall("fused_experts", "out", "overlaps an input", lambda good: {**good, "out": good["hidden_states"]}),
    BadCall(
        "fused_experts", "out", "is on another device", lambda good: {**good, "out": _on_meta(good["hidden_states"])}
    ),
    BadCall("batched_experts", "w13", "has odd rows", _map("w13", lambda t: t[:, :-1])),
    BadCall("batched_experts", "w2", "has another E", _map("w2", lambda t: t[:-1])),
    BadCall("batched_experts", "expert_num_tokens", "has another E", _map("expert_num_tokens", lambda t: t[:-1])),
    BadCall("batched_experts", "expert_num_tokens", "is int64", _map("expert_num_tokens", lambda t: t.long())),
    BadCall("batched_experts", "expert_num_tokens", "is on another device", _map("expert_num_tokens", _on_meta)),
    BadCall(
        "batched_experts", "expert_num_tokens", "is above max_tokens", _map("expert_num_tokens", lambda t: t + 4), True
    ),
    BadCall("batched_experts", "expert_num_tokens", "is negative", _map("expert_num_tokens", lambda t: t - 2), True),
    BadCall("batched_experts", "activation", "is unknown", _set("activation", "tanh")),
    BadCall("batched_experts", "backend", "is unknown", _set("backend", "fastest")),
    BadCall("batched_experts", "allow_tf32", "is a string", _set("allow_tf32", "yes")),
    BadCall("batched_experts", "out", "overlaps an input", lambda good: {**good, "out": good["hidden_states"]}),
    BadCall(
        "batched_experts", "out", "has another shape", lambda good: {**good, "out": good["hidden_states"][:-1].clone()}
    ),
    BadCall("moe_align_block_size", "block_size", "is 0", _set("block_size", 0)),
    BadCall("moe_align_block_size", "block_size", "is no power of two", _set("block_size", 24)),
    BadCall("moe_align_block_size", "block_size", "is a float", _set("block_size", 16.0)),
    BadCall("moe_align_block_size", "num_experts", "is 0", _set("num_experts", 0)),
    BadCall("moe_align_block_size", "num_experts", "is negative", _set("num_experts", -1)),
    BadCall("moe_align_block_size", "topk_ids", "has an id of E", _map("topk_ids", lambda t: t + 3), debug=True),
    BadCall("moe_align_block_size", "expert_map", "has the wrong length", _expert_map(0, 1, 2)),
    *(BadCall(*call) for call in BAD_EXPERTS_CALLS),
)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor of any layout, also of one without a dimension."""
    return tensor.flatten().contiguous().view(torch.uint8)


def _tensors(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among the arguments and the fields of their scales."""
    fields = arguments.get("quant")
    every = arguments | (fields if isinstance(fields, dict) else {})
    return {name: value for name, value in every.items() if isinstance(value, torch.Tensor)}


def _with_scales(arguments: dict[str, Any], functions: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the subject's own value in place of the fields of its scales."""
    fields = arguments.get("quant")
    if not isinstance(fields, dict):
        return arguments
    return arguments | {"quant": functions["ExpertsQuantization"](**fields)}


def judge_bad_call(call: BadCall, functions: dict[str, Any], device: str) -> list[Verdict]:
    """API-01 and 02 on one bad call."""
    bad = call.change(good_arguments(call.function, device, call.base))
    tensors = _tensors(bad)
    before = {name: value.clone() for name, value in tensors.items()}
    debug = functions["debug_checks"]
    try:
        with debug(call.debug):
            functions[call.function](**_with_scales(bad, functions))
    except (ValueError, TypeError) as error:
        named = re.search(rf"\b{re.escape(call.argument)}\b", str(error))
        verdict = NAMED.verdict(bool(named) and "got" in str(error), f"{call}: the error says {str(error)!r}")
    except Exception as error:  # any other class is the finding
        verdict = NAMED.verdict(False, f"{call}: raised {type(error).__name__}: {error}")
    else:
        verdict = NAMED.verdict(False, f"{call}: accepted")
    changed = [
        name
        for name, value in before.items()
        if value.device.type != "meta" and not torch.equal(_bits(value), _bits(tensors[name]))
    ]
    return [verdict, UNTOUCHED.verdict(not changed, f"{call}: changed {changed}")]
