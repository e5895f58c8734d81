"""API, of routing: the calls of `select_experts` that must be refused, judged as `api.py` judges all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .api import BadCall

Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


def _call(argument: str, what: str, change: Change, *, debug: bool = False) -> BadCall:
    return BadCall("select_experts", argument, what, change, debug)


def _values(**values: Any) -> Change:
    return lambda good: {**good, **values}


def _logits(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda good: {**good, "router_logits": change(good["router_logits"])}


def _bias(*shape: int, of: torch.dtype = torch.float32, fill: float = 0.5, device: str | None = None) -> Change:
    return lambda good: {
        **good,
        "e_score_correction_bias": torch.full(shape, fill, dtype=of, device=device or good["router_logits"].device),
    }


def _real_tokens(value: int, *shape: int, of: torch.dtype = torch.int32, device: str | None = None) -> Change:
    return lambda good: {
        **good,
        "num_tokens_non_padded": torch.full(shape, value, dtype=of, device=device or good["router_logits"].device),
    }


def _one_nan(good: Arguments) -> Arguments:
    bias = torch.tensor([0.0, 0.0, float("nan"), 0.0], device=good["router_logits"].device)
    return {**good, "e_score_correction_bias": bias}


def _answering(weights: Any, ids: Any) -> Change:
    """A custom routing function whose answer is made of the right one, by a function each."""

    def change(good: Arguments) -> Arguments:
        def function(
            hidden_states: Any, gating_output: torch.Tensor, topk: int, renormalize: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            shape = (gating_output.shape[0], topk)
            right = torch.full(shape, 0.5, device=gating_output.device)
            of_token = torch.arange(topk, dtype=torch.int32, device=gating_output.device)
            return weights(right), ids(of_token.expand(shape).contiguous())

        return {**good, "custom_routing_function": function}

    return change


def _elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


BAD_ROUTING_CALLS: tuple[BadCall, ...] = (
    _call("router_logits", "has no expert", _logits(lambda t: t[:, :0])),
    _call("router_logits", "is an integer", _logits(lambda t: t.int())),
    _call("top_k", "is 0", _values(top_k=0)),
    _call("top_k", "is negative", _values(top_k=-1)),
    _call("top_k", "is above E", _values(top_k=5)),
    _call("top_k", "is a float", _values(top_k=2.0)),
    _call("top_k", "is a bool", _values(top_k=True)),
    _call("top_k", "is above what the kept groups hold", _values(top_k=3, num_expert_group=2, topk_group=1)),
    _call("renormalize", "is a string", _values(renormalize="yes")),
    _call("scoring_func", "is unknown", _values(scoring_func="relu")),
    _call("scoring_func", "is None", _values(scoring_func=None)),
    _call("num_expert_group", "is 0", _values(num_expert_group=0, topk_group=1)),
    _call("num_expert_group", "does not divide E", _values(num_expert_group=3, topk_group=1)),
    _call("num_expert_group", "is above E", _values(num_expert_group=8, topk_group=8)),
    _call("num_expert_group", "is a float", _values(num_expert_group=2.0, topk_group=1)),
    _call("topk_group", "is missing", _values(num_expert_group=2)),
    _call("topk_group", "is without num_expert_group", _values(topk_group=1)),
    _call("topk_group", "is 0", _values(num_expert_group=2, topk_group=0)),
    _call("topk_group", "is above num_expert_group", _values(num_expert_group=2, topk_group=3)),
    _call("group_ranking", "is unknown", _values(num_expert_group=2, topk_group=1, group_ranking="mean")),
    _call("group_ranking", "is without num_expert_group", _values(group_ranking="max")),
    _call(
        "group_ranking",
        "sums two of a group of one",
        _values(num_expert_group=4, topk_group=2, group_ranking="top2_sum"),
    ),
    _call(
        "group_ranking",
        "would sum two of a group of one",
        lambda good: _bias(4)({**good, "num_expert_group": 4, "topk_group": 2}),
    ),
    _call("e_score_correction_bias", "is a list", _values(e_score_correction_bias=[0.0, 0.0, 0.0, 0.0])),
    _call("e_score_correction_bias", "has another E", _bias(3)),
    _call("e_score_correction_bias", "has a row for each token", _bias(4, 4)),
    _call("e_score_correction_bias", "is float64", _bias(4, of=torch.float64)),
    _call("e_score_correction_bias", "is an integer", _bias(4, of=torch.int32)),
    _call("e_score_correction_bias", "is on another device", _bias(4, device="meta")),
    _call("e_score_correction_bias", "has a NaN", _one_nan, debug=True),
    _call("e_score_correction_bias", "is infinite", _bias(4, fill=float("inf")), debug=True),
    _call("routed_scaling_factor", "is NaN", _values(routed_scaling_factor=float("nan"))),
    _call("routed_scaling_factor", "is infinite", _values(routed_scaling_factor=float("inf"))),
    _call("routed_scaling_factor", "is 0", _values(routed_scaling_factor=0.0)),
    _call("routed_scaling_factor", "is negative", _values(routed_scaling_factor=-1.0)),
    _call("routed_scaling_factor", "is None", _values(routed_scaling_factor=None)),
    _call("routed_scaling_factor", "is a bool", _values(routed_scaling_factor=True)),
    _call("num_tokens_non_padded", "is an int", _values(num_tokens_non_padded=3)),
    _call("num_tokens_non_padded", "is int64", _real_tokens(3, 1, of=torch.int64)),
    _call("num_tokens_non_padded", "has no dimension", _real_tokens(3)),
    _call("num_tokens_non_padded", "has a number for each token", _real_tokens(3, 4)),
    _call("num_tokens_non_padded", "is on another device", _real_tokens(3, 1, device="meta")),
    _call("num_tokens_non_padded", "is negative", _real_tokens(-1, 1), debug=True),
    _call("num_tokens_non_padded", "is above M", _real_tokens(5, 1), debug=True),
    _call("custom_routing_function", "is no function", _values(custom_routing_function="softmax")),
    _call(
        "custom_routing_function",
        "stands beside a bias",
        lambda good: _bias(4)(_answering(_same, _same)(good)),
    ),
    _call(
        "custom_routing_function",
        "stands beside groups",
        lambda good: {**_answering(_same, _same)(good), "num_expert_group": 2, "topk_group": 1},
    ),
    _call(
        "custom_routing_function",
        "stands beside a scoring function",
        lambda good: {**_answering(_same, _same)(good), "scoring_func": "sigmoid"},
    ),
    _call("custom_routing_function", "answers nothing", _values(custom_routing_function=lambda **_: None)),
    _call("custom_routing_function", "answers without weights", _answering(lambda t: None, _same)),
    _call("custom_routing_function", "answers fewer tokens", _answering(lambda t: t[:-1], _same)),
    _call("custom_routing_function", "answers fewer choices", _answering(_same, lambda t: t[:, :-1])),
    _call("custom_routing_function", "answers bfloat16 weights", _answering(lambda t: t.bfloat16(), _same)),
    _call("custom_routing_function", "answers float ids", _answering(_same, lambda t: t.float())),
    _call("custom_routing_function", "answers on another device", _answering(_elsewhere, _same)),
    _call("custom_routing_function", "answers an id of E", _answering(_same, lambda t: t + 3), debug=True),
    _call("custom_routing_function", "answers an id of -1", _answering(_same, lambda t: t - 1), debug=True),
    _call("custom_routing_function", "answers an id twice", _answering(_same, lambda t: t * 0), debug=True),
    _call("backend", "is unknown", _values(backend="fastest")),
)
