"""Sort routed pairs by expert and pad each expert's run to whole blocks: a stable counting sort, without a host sync.

Every program places one chunk of pairs. It needs, for each expert, how many pairs there are in all (that fixes where
the expert's run starts) and how many come before its chunk (that fixes where its own start inside the run). Up to
`_DIRECT_PAIRS` it counts them itself from the ids, and the whole sort is one launch. Above, a first kernel counts
spans of `_CHUNKS_PER_SPAN` chunks, and a program adds spans up. Ranks inside a chunk come from comparing its pairs
with each other. No atomic decides an order, so equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import path
from .pairs import local_expert, map_arguments
from .sizes import cdiv, next_power_of_2


@triton.jit(
    do_not_specialize=[
        "has_expert_map",
        "num_pairs",
        "num_experts",
        "num_local_experts",
        "stride_topk_ids",
        "top_k",
    ]
)
def align_count_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    has_expert_map,
    chunk_prefix_ptr,
    span_total_ptr,
    num_pairs,
    num_experts,
    num_local_experts,
    stride_topk_ids,
    top_k,
    CHUNK: tl.constexpr,
    CHUNKS_PER_SPAN: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """For each expert: pairs of this span before each of its chunks, and pairs of this span."""
    span = tl.program_id(0)
    for first_expert in range(0, num_local_experts, BLOCK_E):
        experts = first_expert + tl.arange(0, BLOCK_E)
        count = tl.zeros((BLOCK_E,), tl.int32)
        for c in range(CHUNKS_PER_SPAN):
            chunk = span * CHUNKS_PER_SPAN + c
            pair = chunk * CHUNK + tl.arange(0, CHUNK)
            expert = local_expert(
                topk_ids_ptr,
                stride_topk_ids,
                pair,
                pair < num_pairs,
                expert_map_ptr,
                num_experts,
                num_local_experts,
                top_k,
                has_expert_map,
            )
            bin_ = expert - first_expert
            inside = (expert >= 0) & (bin_ >= 0) & (bin_ < BLOCK_E)
            offsets = chunk.to(tl.int64) * num_local_experts + experts
            tl.store(chunk_prefix_ptr + offsets, count, mask=experts < num_local_experts)
            count += tl.histogram(tl.where(inside, bin_, 0), BLOCK_E, mask=inside)
        offsets = span.to(tl.int64) * num_local_experts + experts
        tl.store(span_total_ptr + offsets, count, mask=experts < num_local_experts)


@triton.jit(
    do_not_specialize=[
        "has_expert_map",
        "num_pairs",
        "num_spans",
        "max_blocks",
        "blocks_per_program",
        "num_experts",
        "num_local_experts",
        "stride_topk_ids",
        "top_k",
    ]
)
def align_place_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    has_expert_map,
    chunk_prefix_ptr,
    span_total_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    num_pairs,
    num_spans,
    max_blocks,
    blocks_per_program,
    num_experts,
    num_local_experts,
    stride_topk_ids,
    top_k,
    DIRECT: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPARED: tl.constexpr,
    CHUNKS_PER_SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
):
    """Place one chunk's pairs, and fill this program's share of `expert_ids` and of the padding."""
    chunk = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    pair = chunk * CHUNK + lane
    expert = local_expert(
        topk_ids_ptr,
        stride_topk_ids,
        pair,
        pair < num_pairs,
        expert_map_ptr,
        num_experts,
        num_local_experts,
        top_k,
        has_expert_map,
    )
    # The pair's position: its expert's start, plus the pairs of that expert before this chunk, plus those before it
    # in the chunk.
    position = tl.zeros((CHUNK,), tl.int32)
    for first_lane in range(0, CHUNK, COMPARED):
        other_lane = first_lane + tl.arange(0, COMPARED)
        other_pair = chunk * CHUNK + other_lane
        other = local_expert(
            topk_ids_ptr,
            stride_topk_ids,
            other_pair,
            other_pair < num_pairs,
            expert_map_ptr,
            num_experts,
            num_local_experts,
            top_k,
            has_expert_map,
        )
        earlier = (expert[:, None] == other[None, :]) & (other_lane[None, :] < lane[:, None])
        position += tl.sum(earlier.to(tl.int32), axis=1)

    run_start = 0
    for first_expert in range(0, num_local_experts, BLOCK_E):
        experts = first_expert + tl.arange(0, BLOCK_E)
        live = experts < num_local_experts
        total = tl.zeros((BLOCK_E,), tl.int32)
        before = tl.zeros((BLOCK_E,), tl.int32)
        if DIRECT:
            for first_pair in range(0, num_pairs, CHUNK):
                other_pair = first_pair + lane
                other = local_expert(
                    topk_ids_ptr,
                    stride_topk_ids,
                    other_pair,
                    other_pair < num_pairs,
                    expert_map_ptr,
                    num_experts,
                    num_local_experts,
                    top_k,
                    has_expert_map,
                )
                bin_ = other - first_expert
                inside = (other >= 0) & (bin_ >= 0) & (bin_ < BLOCK_E)
                count = tl.histogram(tl.where(inside, bin_, 0), BLOCK_E, mask=inside)
                total += count
                before += tl.where(first_pair < chunk * CHUNK, count, 0)
        else:
            span = chunk // CHUNKS_PER_SPAN
            for first_span in range(0, num_spans, BLOCK_SPANS):
                spans = first_span + tl.arange(0, BLOCK_SPANS)
                counts = tl.load(
                    span_total_ptr + spans.to(tl.int64)[:, None] * num_local_experts + experts[None, :],
                    mask=(spans < num_spans)[:, None] & live[None, :],
                    other=0,
                )
                total += tl.sum(counts, axis=0)
                before += tl.sum(tl.where((spans < span)[:, None], counts, 0), axis=0)
            before += tl.load(chunk_prefix_ptr + chunk.to(tl.int64) * num_local_experts + experts, mask=live, other=0)

        padded = (total + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        end = run_start + tl.cumsum(padded, 0)
        start = end - padded
        bin_ = expert - first_expert
        inside = (expert >= 0) & (bin_ >= 0) & (bin_ < BLOCK_E)
        position += tl.where(inside, tl.gather(start + before, tl.where(inside, bin_, 0), 0), 0)

        # Blocks that lie in these experts' runs: their expert, and the padding behind the expert's last pair.
        for b in range(0, blocks_per_program, BLOCK_BLOCKS):
            in_share = b + tl.arange(0, BLOCK_BLOCKS)
            block = chunk * blocks_per_program + in_share
            mine = (in_share < blocks_per_program) & (block < max_blocks)
            slot = block * BLOCK_M
            owns = (start[None, :] <= slot[:, None]) & (slot[:, None] < end[None, :])
            owner = tl.max(tl.where(owns, experts[None, :], -1), axis=1)
            last = tl.max(tl.where(owns, (start + total)[None, :], -1), axis=1)
            tl.store(expert_ids_ptr + block, owner, mask=mine & (owner >= 0))
            slots = slot[:, None] + tl.arange(0, BLOCK_M)[None, :]
            padding = (mine & (owner >= 0))[:, None] & (slots >= last[:, None])
            tl.store(sorted_token_ids_ptr + slots, tl.full((BLOCK_BLOCKS, BLOCK_M), 0, tl.int32) + num_pairs, padding)
        run_start += tl.sum(padded, axis=0)

    tl.store(sorted_token_ids_ptr + position, pair, mask=expert >= 0)
    # Blocks behind the last run belong to nobody.
    for b in range(0, blocks_per_program, BLOCK_BLOCKS):
        in_share = b + tl.arange(0, BLOCK_BLOCKS)
        block = chunk * blocks_per_program + in_share
        unused = (in_share < blocks_per_program) & (block < max_blocks) & (block * BLOCK_M >= run_start)
        tl.store(expert_ids_ptr + block, tl.full((BLOCK_BLOCKS,), -1, tl.int32), mask=unused)
        slots = block[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        filler = tl.full((BLOCK_BLOCKS, BLOCK_M), 0, tl.int32) + num_pairs
        tl.store(sorted_token_ids_ptr + slots, filler, mask=unused[:, None] & (slots >= 0))
    if chunk == 0:
        tl.store(num_tokens_post_padded_ptr, run_start)


# Pairs that one program compares with each other: the square of it is the work.
_CHUNK = 256
# Of those, how many at a time: the comparisons of one round stay in registers.
_COMPARED = 32
_CHUNKS_PER_SPAN = 4
# Up to here every program counts all pairs itself: cheaper than a second launch.
_DIRECT_PAIRS = 4096
_BLOCK_E = 1024
# Fewer experts fill part of a block; a variant for each number of them would only be one more to compile.
_LEAST_BLOCK_E = 128


def max_num_blocks(num_pairs: int, num_experts: int, block_size: int) -> int:
    """The most blocks that `num_pairs` pairs can take: every expert but one holds a single pair of a block."""
    occupied = min(num_pairs, num_experts)
    return occupied + (num_pairs - occupied) // block_size


def align(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    num_local_experts: int,
    expert_map: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels on checked arguments: `topk_ids [M, top_k]` with M at least 1."""
    num_pairs = topk_ids.numel()
    top_k = topk_ids.shape[1]
    num_blocks = max_num_blocks(num_pairs, num_local_experts, block_size)
    num_slots = num_blocks * block_size
    num_chunks = cdiv(num_pairs, _CHUNK)
    direct = num_pairs <= _DIRECT_PAIRS
    num_spans = 0 if direct else cdiv(num_chunks, _CHUNKS_PER_SPAN)
    num_counts = num_spans * _CHUNKS_PER_SPAN * num_local_experts

    # One allocation; every part starts on 16 bytes, so that no launch differs from another by a pointer's alignment.
    sizes = (num_slots, num_blocks, 1, num_spans * num_local_experts, num_counts)
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + (size + 3) // 4 * 4)
    memory = torch.empty(starts[-1], dtype=torch.int32, device=topk_ids.device)
    sorted_token_ids, expert_ids, num_tokens_post_padded, span_total, chunk_prefix = (
        memory[start : start + size] for start, size in zip(starts, sizes, strict=False)
    )

    block_e = max(_LEAST_BLOCK_E, min(_BLOCK_E, next_power_of_2(num_local_experts)))
    if not direct:
        path.launch(
            align_count_kernel,
            (num_spans,),
            topk_ids,
            *map_arguments(topk_ids, expert_map),
            chunk_prefix,
            span_total,
            num_pairs,
            num_experts,
            num_local_experts,
            topk_ids.stride(0),
            top_k,
            CHUNK=_CHUNK,
            CHUNKS_PER_SPAN=_CHUNKS_PER_SPAN,
            BLOCK_E=block_e,
            num_warps=4,
        )
    # The comparison inside a chunk is quadratic in its lanes; one small variant is enough.
    chunk = 64 if num_pairs <= 64 else _CHUNK
    blocks_per_program = cdiv(num_blocks, num_chunks)
    path.launch(
        align_place_kernel,
        (num_chunks,),
        topk_ids,
        *map_arguments(topk_ids, expert_map),
        chunk_prefix,
        span_total,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        num_pairs,
        num_spans,
        num_blocks,
        blocks_per_program,
        num_experts,
        num_local_experts,
        topk_ids.stride(0),
        top_k,
        DIRECT=direct,
        CHUNK=chunk,
        COMPARED=min(chunk, _COMPARED),
        CHUNKS_PER_SPAN=_CHUNKS_PER_SPAN,
        BLOCK_M=block_size,
        BLOCK_E=block_e,
        BLOCK_SPANS=max(1, min(32, 4096 // block_e)),
        BLOCK_BLOCKS=max(1, min(64, 8192 // block_e)),
        num_warps=4 if chunk <= 64 else 8,
    )
    return sorted_token_ids, expert_ids, num_tokens_post_padded
