"""API, of routing: what its arguments say together that must be refused, judged as `api.py` judges all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .bad_input import Arguments, Bad, Change, mapped, on_meta, put


def _logits(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return mapped("router_logits", change)


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


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


BAD_ROUTING: tuple[Bad, ...] = (
    Bad("router_logits", "has no expert", _logits(lambda t: t[:, :0])),
    Bad("router_logits", "is an integer", _logits(lambda t: t.int())),
    Bad("top_k", "is above what the kept groups hold", put(top_k=3, num_expert_group=2, topk_group=1)),
    Bad("num_expert_group", "does not divide E", put(num_expert_group=3, topk_group=1)),
    Bad("num_expert_group", "is above E", put(num_expert_group=8, topk_group=8)),
    Bad("topk_group", "is missing", put(num_expert_group=2)),
    Bad("topk_group", "is without num_expert_group", put(topk_group=1)),
    Bad("group_ranking", "is without num_expert_group", put(group_ranking="max")),
    Bad(
        "group_ranking",
        "sums two of a group of one",
        put(num_expert_group=4, topk_group=2, group_ranking="top2_sum"),
    ),
    Bad(
        "group_ranking",
        "would sum two of a group of one",
        lambda good: _bias(4)({**good, "num_expert_group": 4, "topk_group": 2}),
    ),
    Bad("e_score_correction_bias", "is a list", put(e_score_correction_bias=[0.0, 0.0, 0.0, 0.0])),
    Bad("e_score_correction_bias", "has another E", _bias(3)),
    Bad("e_score_correction_bias", "has a row for each token", _bias(4, 4)),
    Bad("e_score_correction_bias", "is float64", _bias(4, of=torch.float64)),
    Bad("e_score_correction_bias", "is an integer", _bias(4, of=torch.int32)),
    Bad("e_score_correction_bias", "is on another device", _bias(4, device="meta")),
    Bad("e_score_correction_bias", "has a NaN", _one_nan, debug=True),
    Bad("e_score_correction_bias", "is infinite", _bias(4, fill=float("inf")), debug=True),
    Bad("num_tokens_non_padded", "is an int", put(num_tokens_non_padded=3)),
    Bad("num_tokens_non_padded", "is int64", _real_tokens(3, 1, of=torch.int64)),
    Bad("num_tokens_non_padded", "has no dimension", _real_tokens(3)),
    Bad("num_tokens_non_padded", "has a number for each token", _real_tokens(3, 4)),
    Bad("num_tokens_non_padded", "is on another device", _real_tokens(3, 1, device="meta")),
    Bad("num_tokens_non_padded", "is negative", _real_tokens(-1, 1), debug=True),
    Bad("num_tokens_non_padded", "is above M", _real_tokens(5, 1), debug=True),
    Bad("custom_routing_function", "is no function", put(custom_routing_function="softmax")),
    Bad(
        "custom_routing_function",
        "stands beside a bias",
        lambda good: _bias(4)(_answering(_same, _same)(good)),
    ),
    Bad(
        "custom_routing_function",
        "stands beside groups",
        lambda good: {**_answering(_same, _same)(good), "num_expert_group": 2, "topk_group": 1},
    ),
    Bad(
        "custom_routing_function",
        "stands beside a scoring function",
        lambda good: {**_answering(_same, _same)(good), "scoring_func": "sigmoid"},
    ),
    Bad("custom_routing_function", "answers nothing", put(custom_routing_function=lambda **_: None)),
    Bad("custom_routing_function", "answers without weights", _answering(lambda t: None, _same)),
    Bad("custom_routing_function", "answers fewer tokens", _answering(lambda t: t[:-1], _same)),
    Bad("custom_routing_function", "answers fewer choices", _answering(_same, lambda t: t[:, :-1])),
    Bad("custom_routing_function", "answers bfloat16 weights", _answering(lambda t: t.bfloat16(), _same)),
    Bad("custom_routing_function", "answers float ids", _answering(_same, lambda t: t.float())),
    Bad("custom_routing_function", "answers on another device", _answering(on_meta, _same)),
    Bad("custom_routing_function", "answers an id of E", _answering(_same, lambda t: t + 3), debug=True),
    Bad("custom_routing_function", "answers an id of -1", _answering(_same, lambda t: t - 1), debug=True),
    Bad("custom_routing_function", "answers an id twice", _answering(_same, lambda t: t * 0), debug=True),
)
