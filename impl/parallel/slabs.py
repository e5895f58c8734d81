"""Received tokens in the batched activation format, and their experts' outputs back into one sum a token."""

from __future__ import annotations

import torch

from ..batched import batched_experts
from ..experts_module import RoutedExperts
from ..lora.table import AdapterTable
from .rows import turns
from .wire import Tokens


def slab_rows(local_ids: torch.Tensor, num_local_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each pair lies in the slabs: an expert's pairs in the order of the tokens; nothing waits for the device.

    Args:
        local_ids: `[M, top_k]` int32, -1: no expert.
        num_local_experts: E_local.

    Returns:
        rows: `[M, top_k]` int64, e * M * top_k + the pair's number among those of expert e; -1 without one.
        counts: `[E_local]` int32.
    """
    ids = local_ids.reshape(-1).long()
    counts = (ids[:, None] == torch.arange(num_local_experts, device=ids.device)).sum(dim=0, dtype=torch.int32)
    return torch.where(ids >= 0, ids * max(1, len(ids)) + turns(ids), -1).view(local_ids.shape), counts


def batched_partial(
    experts: RoutedExperts,
    tokens: Tokens,
    local_ids: torch.Tensor,
    dp_size: int,
    adapters: AdapterTable | None = None,
) -> torch.Tensor:
    """`[M, H]`: the experts here on tokens that were received, through slabs that hold every pair of an expert.

    A slab has a row for each pair that could come to its expert, so that nothing is ever dropped: memory for
    E_local * M * top_k rows, which is meant for the few tokens of decoding.

    Args:
        experts: of this rank; not quantised on the way.
        tokens: received.
        local_ids: `[M, top_k]` int32, their ids here.
        dp_size: for the oracle.
        adapters: of these experts; tokens then bear their ids.
    """
    num_tokens, top_k = local_ids.shape
    hidden_size, num_local = experts.hidden_size, experts.num_local_experts
    pairs = num_tokens * top_k
    out = tokens.hidden_states.new_zeros((num_tokens, hidden_size))
    if not pairs or not num_local:
        return out
    rows, counts = slab_rows(local_ids, num_local)
    flat = rows.view(-1)
    # Rows behind the last slab take what has no expert.
    place = torch.where(flat >= 0, flat, num_local * pairs)
    slabs = torch.zeros((num_local * pairs + 1, hidden_size), dtype=out.dtype, device=out.device)
    slabs[place] = tokens.hidden_states.repeat_interleave(top_k, dim=0)
    lora_ids = None
    if adapters is not None and tokens.lora_ids is not None:
        ids = torch.full((num_local * pairs + 1,), -1, dtype=torch.int32, device=out.device)
        ids[place] = tokens.lora_ids.repeat_interleave(top_k)
        lora_ids = ids[:-1].view(num_local, pairs)
    function = experts.function
    result = batched_experts(
        slabs[:-1].view(num_local, pairs, hidden_size),
        experts.w13,
        experts.w2,
        counts,
        w13_bias=experts.w13_bias,
        w2_bias=experts.w2_bias,
        quant=experts.quant,
        activation=function.kind,
        swiglu_alpha=function.alpha,
        swiglu_limit=function.limit,
        interleaved=function.interleaved,
        adapters=adapters,
        lora_ids=lora_ids,
        backend=experts.backend,
        allow_tf32=experts.allow_tf32,
        dp_size=dp_size,
    ).view(num_local * pairs, hidden_size)
    total = torch.zeros((num_tokens, hidden_size), dtype=torch.float32, device=out.device)
    for slot in range(top_k):
        row = rows[:, slot]
        # The weighted rows are rounded to storage as in the standard format, and added in float32.
        weighted = (result[row.clamp(min=0)].float() * tokens.topk_weights[:, slot, None]).to(out.dtype)
        total += torch.where(row[:, None] >= 0, weighted.float(), 0.0)
    return total.to(out.dtype)
