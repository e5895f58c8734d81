"""Which experts each token goes to, and with what weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import path
from .checks import FLOATS, debugging, expect_bool, expect_int, expect_number, expect_one_of, expect_tensor
from .kernels.device import current_device
from .kernels.topk_routing import (
    GROUP_RANKINGS,
    LARGEST_LOGIT,
    RENORMALIZE_GUARD,
    SCORING_FUNCS,
    Groups,
    topk_routing,
)
from .platform import Platform
from .replay import replayable

RoutingFunction = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@replayable(tuple)
def select_experts(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = True,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    group_ranking: str | None = None,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    num_tokens_non_padded: torch.Tensor | None = None,
    custom_routing_function: RoutingFunction | None = None,
    hidden_states: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the experts, choose the top_k of each row, weigh them.

    A score is float32, whatever the logits' dtype: the softmax over the experts (Shazeer et al., arXiv 1701.06538;
    Qwen3-MoE), each logit's sigmoid (DeepSeek-V3, arXiv 2412.19437), or sqrt(softplus(logit)) (DeepSeek-V4). Experts
    come in descending order of score plus bias; a bias ranks and never weighs. Without one they are compared by their
    logits, which do not saturate. With groups (consecutive experts, E / num_expert_group each) only the experts of the
    topk_group best ones may be chosen. Equal experts rank the lower id first, equal groups the lower group.

    A NaN counts as a logit of -inf. At -inf a sigmoid or sqrt(softplus) is 0 and so is a softmax beside a larger logit,
    and the expert ranks below every finite one, whatever its bias. Logits of +inf share a softmax evenly, have a
    sigmoid of 1, and in sqrt(softplus) count as float32's largest number. A row of nothing but -inf and NaN chooses the
    lowest ids and weighs them 1/E before they are renormalised, with softmax, and 0 else. The renormalising sum has
    1e-20 added to it, as in DeepSeek-V3's model code. Ids of a row are always distinct, and no weight is NaN.

    Args:
        router_logits: [M, E] bfloat16, float16 or float32; a row stride above E is fine.
        top_k: experts a token, in [1, E], and at most topk_group * E / num_expert_group.
        scoring_func: "softmax", "sigmoid" or "sqrtsoftplus".
        renormalize: divide the chosen weights by their sum (Qwen3's `norm_topk_prob`).
        num_expert_group: number of groups; divides E. None: no groups.
        topk_group: groups kept, in [1, num_expert_group]; given with num_expert_group.
        group_ranking: "max", a group's best expert (DeepSeek-V2), or "top2_sum", the sum of its best two (DeepSeek-V3),
            each with its bias. None: "top2_sum" with a bias, else "max".
        e_score_correction_bias: [E] bfloat16, float16 or float32; finite.
        routed_scaling_factor: multiplies the weights, after renormalising, once; finite and above 0.
        num_tokens_non_padded: [1] int32 on the logits' device: tokens from that one on are padding, and get ids of -1
            and weights of 0. A CUDA graph reads it anew at each replay.
        custom_routing_function: chooses and weighs instead, called as `f(hidden_states=..., gating_output=...,
            topk=..., renormalize=...)`; returns weights [M, top_k] float32 and ids [M, top_k] int32 or int64. Scoring,
            groups and bias are its own business; scaling and padding are applied to what it returns.
        hidden_states: [M, ...], passed on to a custom routing function.
        backend: "triton", "torch" or None: Triton wherever it runs.

    Returns:
        topk_weights: [M, top_k] float32.
        topk_ids: [M, top_k] int32.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or range, or that does not go with another, by
            name; an unknown backend, or "triton" on a device where it does not run. With `debug_checks` also: a bias
            that is not finite, a number of tokens outside [0, M], custom ids outside [0, E) or twice in a row.
    """
    expect_tensor("router_logits", router_logits, shape=("M", "E"), dtypes=FLOATS)
    num_tokens, num_experts = router_logits.shape
    if num_experts < 1:
        raise ValueError(f"router_logits: expected at least one expert, got shape {list(router_logits.shape)}")
    bias = e_score_correction_bias
    if bias is not None:
        expect_tensor("e_score_correction_bias", bias, shape=(num_experts,), dtypes=FLOATS, like=router_logits)
    groups = expect_method(
        num_experts,
        bias,
        top_k,
        scoring_func,
        renormalize,
        num_expert_group,
        topk_group,
        group_ranking,
        routed_scaling_factor,
        custom_routing_function,
    )
    if num_tokens_non_padded is not None:
        expect_tensor(
            "num_tokens_non_padded", num_tokens_non_padded, shape=(1,), dtypes=(torch.int32,), like=router_logits
        )
    backend = _expect_backend(backend, router_logits)
    if debugging():
        _debug_operands(num_tokens, bias, num_tokens_non_padded)
    # All groups kept is no restriction, and no work.
    if groups is not None and groups.topk_group == groups.num_expert_group:
        groups = None
    path.note("routing", backend if custom_routing_function is None else "custom")
    if num_tokens == 0:
        return (
            router_logits.new_empty((0, top_k), dtype=torch.float32),
            router_logits.new_empty((0, top_k), dtype=torch.int32),
        )
    if custom_routing_function is not None:
        answer = custom_routing_function(
            hidden_states=hidden_states, gating_output=router_logits, topk=top_k, renormalize=renormalize
        )
        weights, ids = _expect_answer(answer, router_logits, top_k)
        return _finished(weights, ids.to(torch.int32), routed_scaling_factor, num_tokens_non_padded)
    method: dict[str, Any] = {
        "scoring_func": scoring_func,
        "renormalize": renormalize,
        "groups": groups,
        "e_score_correction_bias": None if bias is None else bias.float(),
        "routed_scaling_factor": float(routed_scaling_factor),
        "num_tokens_non_padded": num_tokens_non_padded,
    }
    if backend == "triton":
        with current_device(router_logits):
            return topk_routing(router_logits, top_k, **method)
    return _topk_routing_torch(router_logits, top_k, **method)


def expect_method(
    num_experts: int,
    e_score_correction_bias: torch.Tensor | None,
    top_k: int,
    scoring_func: str,
    renormalize: bool,
    num_expert_group: int | None,
    topk_group: int | None,
    group_ranking: str | None,
    routed_scaling_factor: float,
    custom_routing_function: RoutingFunction | None,
) -> Groups | None:
    """Check the arguments of `select_experts` that say how it routes, against the number of experts.

    Returns:
        The groups; None without.

    Raises:
        TypeError, ValueError: by name.
    """
    expect_int("top_k", top_k, low=1, high=num_experts)
    expect_bool("renormalize", renormalize)
    expect_one_of("scoring_func", scoring_func, SCORING_FUNCS)
    bias = e_score_correction_bias
    groups = _expect_groups(num_experts, top_k, num_expert_group, topk_group, group_ranking, bias)
    expect_number("routed_scaling_factor", routed_scaling_factor, above=0)
    if custom_routing_function is not None:
        _expect_custom(custom_routing_function, scoring_func, groups, bias)
    return groups


def _expect_backend(backend: str | None, router_logits: torch.Tensor) -> str:
    runs_triton = Platform.of(router_logits.device).runs_triton
    if backend is None:
        return "triton" if runs_triton else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend: expected 'triton', 'torch' or None, got {backend!r}")
    if backend == "triton" and not runs_triton:
        raise ValueError(f"backend: expected 'torch' where Triton does not run, got 'triton' on {router_logits.device}")
    return backend


def _expect_groups(
    num_experts: int,
    top_k: int,
    num_expert_group: int | None,
    topk_group: int | None,
    group_ranking: str | None,
    bias: torch.Tensor | None,
) -> Groups | None:
    """The groups that the arguments say."""
    if num_expert_group is None:
        for name, value in (("topk_group", topk_group), ("group_ranking", group_ranking)):
            if value is not None:
                raise ValueError(f"{name}: expected None without num_expert_group, got {value!r}")
        return None
    if topk_group is None:
        raise ValueError(
            f"topk_group: expected a number of groups beside num_expert_group {num_expert_group}, got None"
        )
    expect_int("num_expert_group", num_expert_group, low=1, high=num_experts)
    if num_experts % num_expert_group:
        raise ValueError(f"num_expert_group: expected a divisor of {num_experts} experts, got {num_expert_group}")
    expect_int("topk_group", topk_group, low=1, high=num_expert_group)
    if group_ranking is None:
        group_ranking = "max" if bias is None else "top2_sum"
    expect_one_of("group_ranking", group_ranking, GROUP_RANKINGS)
    size = num_experts // num_expert_group
    if group_ranking == "top2_sum" and size < 2:
        raise ValueError(f"group_ranking: expected 'max' for groups of one expert, got {group_ranking!r}")
    if top_k > topk_group * size:
        raise ValueError(f"top_k: expected at most {topk_group} groups of {size} experts, got {top_k}")
    return Groups(num_expert_group, topk_group, group_ranking)


def _expect_custom(function: Any, scoring_func: str, groups: Groups | None, bias: torch.Tensor | None) -> None:
    if not callable(function):
        raise TypeError(f"custom_routing_function: expected a callable or None, got {type(function).__name__}")
    beside = {
        "scoring_func": scoring_func != "softmax",
        "num_expert_group": groups is not None,
        "e_score_correction_bias": bias is not None,
    }
    if any(beside.values()):
        named = [name for name, given in beside.items() if given]
        raise ValueError(f"custom_routing_function: expected to decide alone, got {' and '.join(named)} beside it")


def _expect_answer(answer: Any, router_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a custom routing function returned, checked."""
    name = "custom_routing_function"
    if not (isinstance(answer, tuple) and len(answer) == 2):
        raise TypeError(f"{name}: expected it to return (topk_weights, topk_ids), got {type(answer).__name__}")
    num_tokens, num_experts = router_logits.shape
    shape = (num_tokens, top_k)
    weights = expect_tensor(
        f"{name}'s topk_weights", answer[0], shape=shape, dtypes=(torch.float32,), like=router_logits
    )
    ids = expect_tensor(
        f"{name}'s topk_ids", answer[1], shape=shape, dtypes=(torch.int32, torch.int64), like=router_logits
    )
    if debugging():
        in_order = ids.sort(dim=-1).values
        if bool((in_order < 0).any() | (in_order >= num_experts).any()):
            raise ValueError(f"{name}'s topk_ids: expected ids in [0, {num_experts}), got one outside")
        if bool((in_order[:, 1:] == in_order[:, :-1]).any()):
            raise ValueError(f"{name}'s topk_ids: expected distinct ids in a row, got one twice")
    return weights, ids


def _debug_operands(num_tokens: int, bias: torch.Tensor | None, num_tokens_non_padded: torch.Tensor | None) -> None:
    if bias is not None and not bool(bias.isfinite().all()):
        worst = int((~bias.isfinite()).nonzero()[0])
        raise ValueError(f"e_score_correction_bias: expected finite numbers, got {float(bias[worst])} at {worst}")
    if num_tokens_non_padded is not None and not 0 <= int(num_tokens_non_padded) <= num_tokens:
        raise ValueError(
            f"num_tokens_non_padded: expected a number in [0, {num_tokens}], got {int(num_tokens_non_padded)}"
        )


def _finished(
    weights: torch.Tensor, ids: torch.Tensor, routed_scaling_factor: float, num_tokens_non_padded: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unscaled weights scaled, and padding masked, into new tensors."""
    weights = weights * routed_scaling_factor
    if num_tokens_non_padded is not None:
        padding = torch.arange(weights.shape[0], device=weights.device)[:, None] >= num_tokens_non_padded
        weights, ids = weights.masked_fill(padding, 0.0), ids.masked_fill(padding, -1)
    return weights.contiguous(), ids.contiguous()


def _topk_routing_torch(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    scoring_func: str,
    renormalize: bool,
    groups: Groups | None,
    e_score_correction_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    num_tokens_non_padded: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = router_logits.float()
    logits = torch.where(torch.isnan(logits), -torch.inf, logits)
    if scoring_func == "softmax" and groups is None and e_score_correction_bias is None:
        weights, ids = _topk_softmax_torch(logits, top_k, renormalize)
        return _finished(weights, ids.to(torch.int32), routed_scaling_factor, num_tokens_non_padded)
    scores = _scores(logits, scoring_func)
    unknown = logits == -torch.inf
    value = logits
    if e_score_correction_bias is not None:
        value = (scores + e_score_correction_bias).masked_fill(unknown, -torch.inf)
    if groups is not None:
        of_group = value.unflatten(-1, (groups.num_expert_group, -1))
        if groups.group_ranking == "max":
            group_value = of_group.amax(dim=-1)
        else:
            summed = value if e_score_correction_bias is not None else scores.masked_fill(unknown, -torch.inf)
            group_value = summed.unflatten(-1, (groups.num_expert_group, -1)).topk(2, dim=-1).values.sum(dim=-1)
        best = group_value.sort(dim=-1, descending=True, stable=True).indices[:, : groups.topk_group]
        # The kept groups in ascending order, so that a stable sort of their experts still ranks the lower id first.
        best = best.sort(dim=-1).values
        size = of_group.shape[-1]
        experts = (best[:, :, None] * size + torch.arange(size, device=best.device)).flatten(1)
        ids = experts.gather(1, _ranked(value.gather(1, experts), top_k))
    else:
        ids = _ranked(value, top_k)
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + RENORMALIZE_GUARD)
    return _finished(weights, ids.to(torch.int32), routed_scaling_factor, num_tokens_non_padded)


def _topk_softmax_torch(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax alone: one division, and the largest share is 1, so that no sum is small."""
    ranked, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    share = _softmax_share(ranked, ranked[:, :1])
    chosen = share[:, :top_k]
    total = (chosen if renormalize else share).sum(dim=-1, keepdim=True)
    return chosen / total, ids[:, :top_k]


def _softmax_share(logits: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """exp(logit - maximum), and its limits where that is infinite."""
    return torch.where(maximum.isinf(), (logits == maximum).float(), torch.exp(logits - maximum))


def _ranked(value: torch.Tensor, count: int) -> torch.Tensor:
    return torch.sort(value, dim=-1, descending=True, stable=True).indices[:, :count]


def _scores(logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    if scoring_func == "softmax":
        share = _softmax_share(logits, logits.amax(dim=-1, keepdim=True))
        return share / share.sum(dim=-1, keepdim=True)
    if scoring_func == "sigmoid":
        return torch.sigmoid(logits)
    finite = logits.clamp(max=LARGEST_LOGIT)
    return (finite.clamp(min=0.0) + torch.log1p(torch.exp(-finite.abs()))).sqrt()
