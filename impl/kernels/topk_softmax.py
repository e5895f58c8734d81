"""Softmax over the experts and the top-k of each row, in one pass over the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import path
from .sizes import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "stride_logits", "top_k", "renormalize"])
def topk_softmax_kernel(
    router_logits_ptr,
    topk_weights_ptr,
    topk_ids_ptr,
    num_tokens,
    num_experts,
    stride_logits,
    top_k,
    renormalize,
    SORT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rank by logit, descending; equal logits by id, ascending. NaN ranks and weighs as -inf.

    Each logit becomes a sortable integer with its id in the low half, so that the ranking is a total order: a maximum
    is one lane, never two, and ids stay distinct whatever the row holds.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    experts = tl.arange(0, BLOCK_E)
    live_rows = rows < num_tokens
    live = live_rows[:, None] & (experts < num_experts)[None, :]
    logits = tl.load(
        router_logits_ptr + rows.to(tl.int64)[:, None] * stride_logits + experts[None, :], mask=live, other=0.0
    ).to(tl.float32)
    logits = tl.where(logits != logits, float("-inf"), logits)
    logits = tl.where(logits == 0.0, 0.0, logits)  # -0.0 ties with 0.0

    bits = logits.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the floats' order on signed integers
    lowest = -(2**31)  # below the key of -inf: lanes past the last expert, and lanes already chosen
    key = tl.where(live, key, lowest)
    rank = (key.to(tl.int64) << 32) | (BLOCK_E - 1 - experts).to(tl.int64)[None, :]

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
    chosen_key = (chosen >> 32).to(tl.int32)
    chosen_logits = (chosen_key ^ ((chosen_key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    kept = live_rows[:, None] & (choice < top_k)[None, :]

    # exp(logit - maximum), and its limits: infinite logits share a row evenly, and so does a row of -inf alone. The
    # maximum itself always gives 1, so no sum below is 0 and no weight is NaN.
    maximum = tl.max(tl.where(live, logits, float("-inf")), axis=1)[:, None]
    infinite = (maximum == float("inf")) | (maximum == float("-inf"))
    shift = tl.where(infinite, 0.0, maximum)
    share = tl.where(infinite, tl.where(chosen_logits == maximum, 1.0, 0.0), tl.exp(chosen_logits - shift))
    total = tl.sum(tl.where(kept, share, 0.0), axis=1)
    if renormalize == 0:
        shares = tl.where(infinite, tl.where(logits == maximum, 1.0, 0.0), tl.exp(logits - shift))
        total = tl.sum(tl.where(live, shares, 0.0), axis=1)
    total = tl.where(live_rows, total, 1.0)
    weights = share / total[:, None]

    offsets = rows.to(tl.int64)[:, None] * top_k + choice[None, :]
    tl.store(topk_weights_ptr + offsets, weights, mask=kept)
    tl.store(topk_ids_ptr + offsets, ids, mask=kept)


# Up to this top_k one reduction a choice is cheaper than sorting the row.
_SORT_FROM = 33
_LANES = 1024
# Smaller blocks would only be more variants to compile.
_LEAST_LANES, _LEAST_CHOICES = 32, 8


def topk_softmax(router_logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on checked arguments: `router_logits [M, E]` with M at least 1."""
    num_tokens, num_experts = router_logits.shape
    topk_weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=router_logits.device)
    topk_ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=router_logits.device)
    block_e = max(_LEAST_LANES, next_power_of_2(num_experts))
    block_rows = max(1, min(8, _LANES // block_e))
    path.launch(
        topk_softmax_kernel,
        (cdiv(num_tokens, block_rows),),
        router_logits,
        topk_weights,
        topk_ids,
        num_tokens,
        num_experts,
        router_logits.stride(0),
        top_k,
        int(renormalize),
        SORT=top_k >= _SORT_FROM,
        BLOCK_ROWS=block_rows,
        BLOCK_E=block_e,
        BLOCK_K=max(_LEAST_CHOICES, next_power_of_2(top_k)),
        num_warps=4 if block_e <= 2 * _LANES else 8,
    )
    return topk_weights, topk_ids
