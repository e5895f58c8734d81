"""What ranks do around collectives, in a launch each: where tokens go, what they carry, the sum of what returns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import path
from ..platform import Platform, Vendor
from .device import current_device
from .sizes import cdiv, next_power_of_2


@triton.jit
def _ranks_of(ids, rank_of_ptr, num_ids):
    """The rank of each id's expert, -1 where there is none; a stray id is no expert."""
    return tl.load(rank_of_ptr + ids, mask=(ids >= 0) & (ids < num_ids), other=-1)


@triton.jit(
    do_not_specialize=["num_tokens", "num_ids", "stride_topk_ids", "top_k", "padded_tokens", "stays"],
    do_not_specialize_on_alignment=["topk_ids_ptr"],
)
def plan_travel_kernel(
    topk_ids_ptr,
    rank_of_ptr,
    places_ptr,
    numbers_ptr,
    num_tokens,
    num_ids,
    stride_topk_ids,
    top_k,
    padded_tokens,
    stays,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One rank's tokens, numbered in their order: a program walks all of them, as a number hangs on those before.

    The rank `stays` gets none. Behind the counts of all ranks `padded_tokens` is written.
    """
    rank = tl.program_id(0)
    lane = tl.arange(0, BLOCK_TOKENS)
    choice = tl.arange(0, BLOCK_K)
    count = 0
    for first in range(0, num_tokens, BLOCK_TOKENS):
        token = first + lane
        inside = token < num_tokens
        ids = tl.load(
            topk_ids_ptr + token.to(tl.int64)[:, None] * stride_topk_ids + choice[None, :],
            mask=inside[:, None] & (choice < top_k)[None, :],
            other=-1,
        )
        here = (_ranks_of(ids, rank_of_ptr, num_ids) == rank) & (rank != stays)
        goes = tl.max(here.to(tl.int32), axis=1)
        place = count + tl.cumsum(goes, 0) - 1
        tl.store(places_ptr + rank.to(tl.int64) * num_tokens + token, tl.where(goes > 0, place, -1), mask=inside)
        count += tl.sum(goes, axis=0)
    tl.store(numbers_ptr + rank, count)
    tl.store(numbers_ptr + tl.num_programs(0), padded_tokens)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_ids",
        "num_scales",
        "num_words",
        "stride_topk_ids",
        "stride_weights",
        "stride_scales",
        "top_k",
    ],
    # Words of a token lie wherever a row of the caller's ends.
    do_not_specialize_on_alignment=["topk_ids_ptr", "topk_weights_ptr", "lora_ids_ptr", "scales_ptr"],
)
def pack_rows_kernel(
    rows_ptr,
    words_ptr,
    x_ptr,
    topk_ids_ptr,
    topk_weights_ptr,
    lora_ids_ptr,
    scales_ptr,
    places_ptr,
    counts_ptr,
    room_ptr,
    rank_of_ptr,
    local_of_ptr,
    num_tokens,
    num_ids,
    hidden_size,
    num_scales,
    num_words,
    stride_rows,
    stride_words,
    stride_x,
    stride_topk_ids,
    stride_weights,
    stride_scales,
    top_k,
    ONE: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """One token for one rank: its hidden state, and in words its ids, weights, adapter and scales.

    With places a rank gets the tokens of its experts, by its own numbers of them, as many as there is room for; room
    that is left is padding, with anything for a hidden state. Without, every rank gets every token, and rows behind the
    last token are padding: no expert, no adapter, zeros.
    """
    token = tl.program_id(0)
    rank = tl.program_id(1)
    real = token < num_tokens
    row = token.to(tl.int64)
    word = tl.arange(0, BLOCK_WORDS)
    if HAS_PLACES:
        before = tl.arange(0, BLOCK_RANKS)
        first_row = tl.sum(tl.load(room_ptr + before, mask=before < rank, other=0).to(tl.int64), axis=0)
        room = tl.load(room_ptr + rank)
        if (token < room) & (token >= tl.load(counts_ptr + rank)):
            nothing = tl.where(word < top_k, -1, tl.where(word < 2 * top_k, 0, ONE))
            if HAS_LORA:
                nothing = tl.where(word == 2 * top_k, -1, nothing)
            tl.store(words_ptr + (first_row + token) * stride_words + word, nothing, mask=word < num_words)
        place = tl.load(places_ptr + rank.to(tl.int64) * num_tokens + token, mask=real, other=-1)
        if (place < 0) | (place >= room):
            return
        row = first_row + place
    is_id = (word < top_k) & real
    source = token.to(tl.int64)
    ids = tl.load(topk_ids_ptr + source * stride_topk_ids + word, mask=is_id, other=-1)
    if HAS_PLACES:
        there = is_id & (_ranks_of(ids, rank_of_ptr, num_ids) == rank)
        ids = tl.load(local_of_ptr + ids, mask=there, other=-1)
    is_weight = (word >= top_k) & (word < 2 * top_k) & real
    weights = tl.load(topk_weights_ptr + source * stride_weights + word - top_k, mask=is_weight, other=0)
    value = tl.where(word < top_k, ids, weights)
    first_scale = 2 * top_k
    if HAS_LORA:
        adapter = tl.load(lora_ids_ptr + source, mask=real, other=-1)
        value = tl.where(word == first_scale, adapter, value)
        first_scale += 1
    if HAS_SCALES:
        scale = word - first_scale
        is_scale = (scale >= 0) & (scale < num_scales)
        scales = tl.load(scales_ptr + source * stride_scales + scale, mask=is_scale & real, other=ONE)
        value = tl.where(is_scale, scales, value)
    tl.store(words_ptr + row * stride_words + word, value, mask=word < num_words)
    lane = tl.arange(0, BLOCK_H)
    for first in range(0, hidden_size, BLOCK_H):
        column = first + lane
        inside = column < hidden_size
        x = tl.load(x_ptr + source * stride_x + column, mask=inside & real, other=0)
        tl.store(rows_ptr + row * stride_rows + column, x, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_ranks", "stays"])
def sum_ranks_kernel(
    back_ptr,
    own_ptr,
    out_ptr,
    places_ptr,
    room_ptr,
    num_tokens,
    num_ranks,
    stays,
    hidden_size,
    BLOCK_H: tl.constexpr,
):
    """A token's rows added in the order of the ranks, in float32, and rounded once; those of `stays` are its own."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < hidden_size
    total = tl.zeros((BLOCK_H,), tl.float32)
    first = tl.zeros((), tl.int64)
    for rank in range(num_ranks):
        place = tl.load(places_ptr + tl.cast(rank, tl.int64) * num_tokens + token)
        row = first + place
        total += tl.load(back_ptr + row * hidden_size + column, mask=inside & (place >= 0), other=0.0).to(tl.float32)
        own_ptrs = own_ptr + token.to(tl.int64) * hidden_size + column
        total += tl.load(own_ptrs, mask=inside & (rank == stays), other=0.0).to(tl.float32)
        first += tl.load(room_ptr + rank)
    tl.store(out_ptr + token.to(tl.int64) * hidden_size + column, total.to(out_ptr.dtype.element_ty), mask=inside)


# Bits of a float32 scale of 1, which padding has.
ONE = 0x3F800000
# Pairs that a program of the plan looks at together: few enough for the shared memory of every GPU.
_PAIRS = 4096
# Blocks of words, choices and ranks are no smaller: idle lanes cost nothing, and each size is a kernel to compile.
_WORDS, _CHOICES, _RANKS, _COLUMNS = 16, 8, 8, 512
# Rows are moved as numbers of their elements' size, whatever they are.
_MOVED = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _columns_at_once(hidden_size: int, most: int, device: torch.device) -> int:
    """Columns of a row that a program moves or adds at a time; under the interpreter small rows take several turns."""
    columns = next_power_of_2(hidden_size)
    if Platform.of(device).vendor is Vendor.CPU:
        return min(256, columns)
    return max(_COLUMNS, min(most, columns))


def plan_travel(
    places: torch.Tensor,
    numbers: torch.Tensor,
    topk_ids: torch.Tensor,
    rank_of: torch.Tensor,
    padded_tokens: int,
    stays: int | None = None,
) -> None:
    """Launch the kernel: `places [num_ranks, M]`, `numbers [num_ranks + 1]`, of `topk_ids [M, top_k]`; all int32."""
    num_ranks, num_tokens = places.shape
    top_k = topk_ids.shape[1]
    block_k = max(_CHOICES, next_power_of_2(top_k))
    on_cpu = Platform.of(topk_ids.device).vendor is Vendor.CPU
    with current_device(topk_ids):
        path.launch(
            plan_travel_kernel,
            (num_ranks,),
            topk_ids,
            rank_of,
            places,
            numbers,
            num_tokens,
            len(rank_of),
            topk_ids.stride(0),
            top_k,
            padded_tokens,
            -1 if stays is None else stays,
            BLOCK_TOKENS=64 if on_cpu else max(64, _PAIRS // block_k),
            BLOCK_K=block_k,
            num_warps=16,
        )


def pack_rows(
    rows: torch.Tensor,
    words: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    lora_ids: torch.Tensor | None,
    scales: torch.Tensor | None,
    places: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    room: torch.Tensor | None = None,
    rank_of: torch.Tensor | None = None,
    local_of: torch.Tensor | None = None,
    *,
    most: int = 0,
) -> None:
    """Launch the kernel.

    Args:
        rows: `[n, H]`, strided, of the hidden states' dtype: what is written.
        words: `[n, W]` int32, strided, of the same memory.
        hidden_states: `[M, H]`.
        topk_ids: `[M, top_k]` int32.
        topk_weights: `[M, top_k]` float32.
        lora_ids: `[M]` int32, or None.
        scales: `[M, S]` float32 that travel, or None.
        places: from `plan_travel`; None: every row in its place, and padding up to n.
        counts: likewise.
        room: `[num_ranks]` int32, rows set aside for each rank; beside places.
        rank_of: of ids, int32; beside places.
        local_of: likewise.
        most: rows set aside for any rank, where there may be more than it has tokens.
    """
    num_tokens, top_k = topk_ids.shape
    hidden_size, num_words = rows.shape[1], words.shape[1]
    num_ranks = 1 if places is None else len(places)
    moved = _MOVED[rows.element_size()]
    with current_device(topk_ids):
        path.launch(
            pack_rows_kernel,
            (len(rows), 1) if places is None else (max(num_tokens, most), num_ranks),
            rows.view(moved),
            words,
            hidden_states.view(moved),
            topk_ids,
            topk_weights.view(torch.int32),
            lora_ids,
            None if scales is None else scales.view(torch.int32),
            places,
            counts,
            room,
            rank_of,
            local_of,
            num_tokens,
            0 if rank_of is None else len(rank_of),
            hidden_size,
            0 if scales is None else scales.shape[1],
            num_words,
            rows.stride(0),
            words.stride(0),
            hidden_states.stride(0),
            topk_ids.stride(0),
            topk_weights.stride(0),
            0 if scales is None else scales.stride(0),
            top_k,
            ONE=ONE,
            HAS_PLACES=places is not None,
            HAS_LORA=lora_ids is not None,
            HAS_SCALES=scales is not None,
            BLOCK_RANKS=1 if places is None else max(_RANKS, next_power_of_2(num_ranks)),
            BLOCK_H=_columns_at_once(hidden_size, 2048, topk_ids.device),
            BLOCK_WORDS=max(_WORDS, next_power_of_2(num_words)),
            num_warps=4,
        )


def sum_ranks(
    out: torch.Tensor,
    back: torch.Tensor,
    places: torch.Tensor,
    room: torch.Tensor,
    own: torch.Tensor | None = None,
    stays: int | None = None,
) -> None:
    """Launch the kernel: `back [S, H]`, by rank (`room` rows) and in each by `places`, into `out [M, H]`; all dense.

    The rows of rank `stays` are `own [M, H]`, where there are any.
    """
    num_tokens, hidden_size = out.shape
    block_h = _columns_at_once(hidden_size, 1024, out.device)
    with current_device(out):
        path.launch(
            sum_ranks_kernel,
            (num_tokens, cdiv(hidden_size, block_h)),
            back,
            back if own is None else own,
            out,
            places,
            room,
            num_tokens,
            len(places),
            -1 if own is None or stays is None else stays,
            hidden_size,
            BLOCK_H=block_h,
            num_warps=4,
        )
