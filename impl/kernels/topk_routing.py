"""Top-k routing in one pass over the logits: scores, groups, the top-k of each row, weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import path
from .sizes import cdiv, next_power_of_2

SCORING_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_RANKINGS = ("max", "top2_sum")
# DeepSeek-V3's model code adds it to the sum that renormalises, which may be 0.
RENORMALIZE_GUARD = 1e-20
# The logit that stands for +inf where a score would be infinite: float32's largest.
LARGEST_LOGIT = 3.4028234663852886e38
_GUARD, _LARGEST = tl.constexpr(RENORMALIZE_GUARD), tl.constexpr(LARGEST_LOGIT)


@triton.jit
def _sortable(values):
    """The floats' order on signed integers; -0.0 equals 0.0."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float that a sortable integer stands for."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _softmax_share(logits, maximum):
    """exp(logit - maximum), and its limits: infinite logits share a row evenly, and so does a row of -inf alone.

    The maximum itself always gives 1, so no sum over a row is 0 and no weight is NaN.
    """
    infinite = (maximum == float("inf")) | (maximum == float("-inf"))
    shift = tl.where(infinite, 0.0, maximum)
    return tl.where(infinite, tl.where(logits == maximum, 1.0, 0.0), tl.exp(logits - shift))


@triton.jit
def _log1p(x):
    """log(1 + x) of x in [0, 1], to a few roundings: 1 + x rounds small x away, and GPUs' fast log is coarse near 1.

    2 atanh(z) = 2 (z + z^3 / 3 + z^5 / 5 + ...), z = x / (2 + x), at most 1/3: what is left out is under 2e-8 of it.
    """
    z = x / (2.0 + x)
    y = z * z
    series = 1.0 / 11.0 + y * (1.0 / 13.0)
    series = 1.0 / 7.0 + y * (1.0 / 9.0 + y * series)
    series = 1.0 + y * (1.0 / 3.0 + y * (1.0 / 5.0 + y * series))
    return 2.0 * z * series


@triton.jit
def _score(logits, maximum, total, scoring_func):
    """The scores of logits: softmax (0) with the row's maximum and sum of shares, sigmoid (1), sqrt(softplus) (2)."""
    if scoring_func == 0:
        scores = _softmax_share(logits, maximum) / total
    elif scoring_func == 1:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        finite = tl.minimum(logits, _LARGEST)
        scores = tl.sqrt(tl.maximum(finite, 0.0) + _log1p(tl.exp(-tl.abs(finite))))
    return scores


@triton.jit
def _eligible(
    rank,
    maximum,
    total,
    scoring_func,
    has_bias,
    group_ranking,
    topk_group,
    num_groups,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Which lanes lie in their row's topk_group best groups, `[BLOCK_ROWS, BLOCK_G * BLOCK_S]`."""
    grouped = tl.reshape(rank, (BLOCK_ROWS, BLOCK_G, BLOCK_S))
    first = tl.max(grouped, axis=2)
    value = _value((first >> 32).to(tl.int32))
    if group_ranking == 1:
        second = tl.max(tl.where(grouped == first[:, :, None], -(2**63), grouped), axis=2)
        other = _value((second >> 32).to(tl.int32))
        if has_bias == 0:
            # Without a bias the ranks hold logits. Of -inf nothing can be known: it stays below every score.
            lowest = float("-inf")
            value = tl.where(value == lowest, lowest, _score(value, maximum, total, scoring_func))
            other = tl.where(other == lowest, lowest, _score(other, maximum, total, scoring_func))
        value += other
    groups = tl.arange(0, BLOCK_G)
    group_rank = (_sortable(value).to(tl.int64) << 32) | (BLOCK_G - 1 - groups).to(tl.int64)[None, :]
    group_rank = tl.where((groups < num_groups)[None, :], group_rank, -(2**63))
    kept = tl.full((BLOCK_ROWS, BLOCK_G), 0, tl.int32)
    for _ in range(topk_group):
        best = group_rank == tl.max(group_rank, axis=1)[:, None]
        kept = tl.where(best, 1, kept)
        group_rank = tl.where(best, -(2**63), group_rank)
    lanes = tl.broadcast_to(kept[:, :, None], (BLOCK_ROWS, BLOCK_G, BLOCK_S))
    return tl.reshape(lanes, (BLOCK_ROWS, BLOCK_G * BLOCK_S)) == 1


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_experts",
        "stride_logits",
        "top_k",
        "renormalize",
        "routed_scaling_factor",
        "is_padded",
        "scoring_func",
        "has_bias",
        "group_ranking",
        "group_size",
        "num_groups",
        "topk_group",
    ],
    do_not_specialize_on_alignment=["bias_ptr", "num_tokens_non_padded_ptr"],
)
def topk_routing_kernel(
    router_logits_ptr,
    bias_ptr,
    num_tokens_non_padded_ptr,
    topk_weights_ptr,
    topk_ids_ptr,
    num_tokens,
    num_experts,
    stride_logits,
    top_k,
    renormalize,
    routed_scaling_factor,
    is_padded,
    scoring_func,
    has_bias,
    group_ranking,
    group_size,
    num_groups,
    topk_group,
    PLAIN: tl.constexpr,
    GROUPED: tl.constexpr,
    SORT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rank by logit, or by score plus bias, descending; equal ones by id, ascending. A NaN counts as -inf.

    Each value becomes a sortable integer with its lane in the low half, so that the ranking is a total order: a maximum
    is one lane, never two, and ids stay distinct whatever the row holds. A group has BLOCK_S lanes, which its experts
    need not fill; without groups all experts are one.

    PLAIN is softmax without bias and groups, and needs no score before its experts are chosen. What else the methods
    differ in are run-time values: a few uniform branches cost less than a compiled variant for each.
    """
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_S
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lanes = tl.arange(0, BLOCK_E)
    live_rows = rows < num_tokens
    if GROUPED:
        experts = lanes // BLOCK_S * group_size + lanes % BLOCK_S
        exists = (lanes % BLOCK_S < group_size) & (lanes // BLOCK_S < num_groups)
    else:
        experts = lanes
        exists = experts < num_experts
    live = live_rows[:, None] & exists[None, :]
    row_ptr = router_logits_ptr + rows.to(tl.int64)[:, None] * stride_logits
    logits = tl.load(row_ptr + experts[None, :], mask=live, other=0.0).to(tl.float32)
    logits = tl.where(logits != logits, float("-inf"), logits)
    logits = tl.where(logits == 0.0, 0.0, logits)  # -0.0 ties with 0.0
    maximum = tl.max(tl.where(live, logits, float("-inf")), axis=1)[:, None]

    value = logits
    total = tl.full((BLOCK_ROWS, 1), 1.0, tl.float32)
    if not PLAIN:
        if scoring_func == 0:
            total = tl.sum(tl.where(live, _softmax_share(logits, maximum), 0.0), axis=1)[:, None]
        total = tl.where(live_rows[:, None], total, 1.0)
        if has_bias:
            bias = tl.load(bias_ptr + experts, mask=exists, other=0.0)
            biased = _score(logits, maximum, total, scoring_func) + bias[None, :]
            value = tl.where(logits == float("-inf"), logits, biased)

    lowest = -(2**31)  # below the key of -inf: lanes past the last expert, and lanes already chosen
    key = tl.where(live, _sortable(value), lowest)
    rank = (key.to(tl.int64) << 32) | (BLOCK_E - 1 - lanes).to(tl.int64)[None, :]
    if GROUPED:
        eligible = _eligible(
            rank,
            maximum,
            total,
            scoring_func,
            has_bias,
            group_ranking,
            topk_group,
            num_groups,
            BLOCK_ROWS,
            BLOCK_G,
            BLOCK_S,
        )
        rank = tl.where(eligible, rank, -(2**63))

    choice = tl.arange(0, BLOCK_K)
    if SORT:
        chosen = tl.sort(rank, descending=True)
        if BLOCK_K < BLOCK_E:
            # The first BLOCK_K columns: split the row into runs of BLOCK_K and keep run 0.
            runs = tl.reshape(chosen, (BLOCK_ROWS, BLOCK_E // BLOCK_K, BLOCK_K))
            first = tl.arange(0, BLOCK_E // BLOCK_K)[None, :, None] == 0
            chosen = tl.max(tl.where(first, runs, -(2**63)), axis=1)
    else:
        chosen = tl.full((BLOCK_ROWS, BLOCK_K), 0, tl.int64)
        for j in range(top_k):
            best = tl.max(rank, axis=1)
            chosen = tl.where(choice[None, :] == j, best[:, None], chosen)
            rank = tl.where(rank == best[:, None], -(2**63), rank)

    ids = BLOCK_E - 1 - (chosen & 0xFFFFFFFF).to(tl.int32)
    if GROUPED:
        ids = ids // BLOCK_S * group_size + ids % BLOCK_S
    kept = live_rows[:, None] & (choice < top_k)[None, :]

    if PLAIN:
        share = _softmax_share(_value((chosen >> 32).to(tl.int32)), maximum)
        divisor = tl.sum(tl.where(kept, share, 0.0), axis=1)
        if renormalize == 0:
            divisor = tl.sum(tl.where(live, _softmax_share(logits, maximum), 0.0), axis=1)
        divisor = tl.where(live_rows, divisor, 1.0)
        weights = share / divisor[:, None]
    else:
        # The logit at the id says the weight, and no bias can be in it.
        at_ids = tl.load(row_ptr + ids, mask=kept, other=0.0).to(tl.float32)
        at_ids = tl.where(at_ids != at_ids, float("-inf"), at_ids)
        weights = _score(at_ids, maximum, total, scoring_func)
        if renormalize:
            weights /= tl.sum(tl.where(kept, weights, 0.0), axis=1)[:, None] + _GUARD
    weights *= routed_scaling_factor
    if is_padded:
        is_token = (rows < tl.load(num_tokens_non_padded_ptr))[:, None]
        weights = tl.where(is_token, weights, 0.0)
        ids = tl.where(is_token, ids, -1)

    offsets = rows.to(tl.int64)[:, None] * top_k + choice[None, :]
    tl.store(topk_weights_ptr + offsets, weights, mask=kept)
    tl.store(topk_ids_ptr + offsets, ids, mask=kept)


# Up to this top_k one reduction a choice is cheaper than sorting the row.
_SORT_FROM = 33
_LANES = 1024
# Smaller blocks would only be more variants to compile.
_LEAST_LANES, _LEAST_CHOICES = 32, 8


@dataclass(frozen=True)
class Groups:
    """Experts are chosen from the `topk_group` best of `num_expert_group` groups, ranked by `group_ranking`."""

    num_expert_group: int
    topk_group: int
    group_ranking: str


def topk_routing(
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
    """Launch the kernel on checked arguments: `router_logits [M, E]` with M at least 1; the bias is float32."""
    num_tokens, num_experts = router_logits.shape
    topk_weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=router_logits.device)
    topk_ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=router_logits.device)
    group_size = num_experts if groups is None else num_experts // groups.num_expert_group
    block_s = next_power_of_2(group_size)
    block_g = 1 if groups is None else next_power_of_2(groups.num_expert_group)
    if block_g * block_s < _LEAST_LANES:
        block_g, block_s = (1, _LEAST_LANES) if groups is None else (_LEAST_LANES // block_s, block_s)
    block_e = block_g * block_s
    block_rows = max(1, min(8, _LANES // block_e))
    path.launch(
        topk_routing_kernel,
        (cdiv(num_tokens, block_rows),),
        router_logits,
        # An absent operand is a pointer of its type that is never read: None would be a variant of its own.
        topk_weights if e_score_correction_bias is None else e_score_correction_bias,
        topk_ids if num_tokens_non_padded is None else num_tokens_non_padded,
        topk_weights,
        topk_ids,
        num_tokens,
        num_experts,
        router_logits.stride(0),
        top_k,
        int(renormalize),
        routed_scaling_factor,
        int(num_tokens_non_padded is not None),
        SCORING_FUNCS.index(scoring_func),
        int(e_score_correction_bias is not None),
        0 if groups is None else GROUP_RANKINGS.index(groups.group_ranking),
        group_size,
        1 if groups is None else groups.num_expert_group,
        1 if groups is None else groups.topk_group,
        PLAIN=scoring_func == "softmax" and groups is None and e_score_correction_bias is None,
        GROUPED=groups is not None,
        SORT=top_k >= _SORT_FROM,
        BLOCK_ROWS=block_rows,
        BLOCK_G=block_g,
        BLOCK_S=block_s,
        BLOCK_K=max(_LEAST_CHOICES, next_power_of_2(top_k)),
        num_warps=4 if block_e <= 2 * _LANES else 8,
    )
    return topk_weights, topk_ids
