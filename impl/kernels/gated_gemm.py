"""The first GEMM and its activation in one kernel: h[slot] = act(gate, up) of the pair that the alignment put there.

Rows are gathered by token, weights come by TMA, and h is written in the alignment's order, so that the second GEMM
reads a block of rows as one tile. Gate and up are rounded to the storage dtype before the activation, as if they had
been written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import path
from ..config import ActivationFunction
from .activation import activated
from .descriptors import gate_up_tiles, row_tiles
from .pairs import routing_weight_ptrs
from .sizes import cdiv

# Gate rows of a tile before their up rows follow: then both of a column, and of its neighbour, lie in one thread.
GROUP = tl.constexpr(8)


@triton.jit
def tile_at(index, num_m_blocks, num_n_blocks, GROUP_M: tl.constexpr):
    """The row block and the column block of tile `index`: groups of row blocks walk the weight rows together."""
    if GROUP_M == 1:
        pid_m = index // num_n_blocks
        pid_n = index % num_n_blocks
    else:
        group = index // (GROUP_M * num_n_blocks)
        in_group = index % (GROUP_M * num_n_blocks)
        group_size = min(num_m_blocks - group * GROUP_M, GROUP_M)
        pid_m = group * GROUP_M + in_group % group_size
        pid_n = in_group // group_size
    return pid_m, pid_n


@triton.jit
def _gated_rows(
    x_ptr,
    w_desc,
    h_ptr,
    h_desc,
    slots_ptr,
    bias_ptr,
    topk_weights_ptr,
    slot,
    expert,
    pid_n,
    num_pairs,
    size,
    K,
    stride_x,
    stride_bias,
    stride_weights,
    top_k,
    alpha,
    limit,
    mul_weight,
    has_bias,
    bias_step,
    up_bias,
    EXTRAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SWAP_AB: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE_X: tl.constexpr,
    GATHER_ALL: tl.constexpr,
):
    """ROWS slots from `slot` on, BLOCK_I columns of h."""
    lane_k = tl.arange(0, BLOCK_K)
    slots = slot + tl.arange(0, ROWS)
    pairs = tl.load(slots_ptr + slots)
    real = pairs < num_pairs
    # Padding computes a row that nobody reads: which one does not matter, and its load needs no mask.
    token = tl.where(real, pairs, 0) // top_k
    rows = (token.to(tl.int64) if WIDE_X else token) * stride_x
    if SWAP_AB:
        offsets = rows[None, :] + lane_k[:, None]
        gate = tl.zeros((BLOCK_I, ROWS), tl.float32)
        up = gate
    else:
        offsets = rows[:, None] + lane_k[None, :]
        acc = tl.zeros((ROWS, PARTS * BLOCK_I), tl.float32)
    first = pid_n * (BLOCK_I // GROUP)
    for k in range(0, K, BLOCK_K):
        if EVEN_K and GATHER_ALL:
            x = tl.load(x_ptr + offsets)
        elif SWAP_AB:
            mask = real[None, :] if EVEN_K else real[None, :] & (lane_k < K - k)[:, None]
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        else:
            mask = real[:, None] if EVEN_K else real[:, None] & (lane_k < K - k)[None, :]
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        if SWAP_AB:
            w = tl.reshape(w_desc.load([expert, 0, pid_n * BLOCK_I, k]), (BLOCK_I, BLOCK_K))
            gate = tl.dot(w, x, gate)
            if PARTS == 2:
                w = tl.reshape(w_desc.load([expert, 1, pid_n * BLOCK_I, k]), (BLOCK_I, BLOCK_K))
                up = tl.dot(w, x, up)
        else:
            w = tl.reshape(w_desc.load([expert, first, 0, 0, k]), (PARTS * BLOCK_I, BLOCK_K))
            acc = tl.dot(x, w.T, acc)
        x_ptr += BLOCK_K
    if not SWAP_AB:
        if PARTS == 2:
            parts = tl.permute(tl.reshape(acc, (ROWS, BLOCK_I // GROUP, 2, GROUP)), (0, 1, 3, 2))
            gate, up = tl.split(parts)
            gate, up = tl.reshape(gate, (ROWS, BLOCK_I)), tl.reshape(up, (ROWS, BLOCK_I))
        else:
            gate, up = acc, acc

    STORAGE: tl.constexpr = h_ptr.dtype.element_ty
    columns = pid_n * BLOCK_I + tl.arange(0, BLOCK_I)
    if EXTRAS:
        # Which of them there is, is a run-time value: as constants they would multiply the compiled variants.
        if mul_weight != 0:
            weight_ptrs = routing_weight_ptrs(topk_weights_ptr, stride_weights, pairs, top_k)
            weight = tl.load(weight_ptrs, mask=real, other=0.0)
            weight = weight[None, :] if SWAP_AB else weight[:, None]
            gate, up = gate * weight, up * weight
        if has_bias != 0:
            bias_ptrs = bias_ptr + expert.to(tl.int64) * stride_bias + columns * bias_step
            gate_bias = tl.load(bias_ptrs, mask=columns < size, other=0.0).to(tl.float32)
            gate += gate_bias[:, None] if SWAP_AB else gate_bias[None, :]
            if PARTS == 2:
                up_bias_row = tl.load(bias_ptrs + up_bias, mask=columns < size, other=0.0).to(tl.float32)
                up += up_bias_row[:, None] if SWAP_AB else up_bias_row[None, :]
    h = activated(gate.to(STORAGE).to(tl.float32), up.to(STORAGE).to(tl.float32), alpha, limit, ACTIVATION)
    h = h.to(STORAGE)
    if SWAP_AB:
        h = tl.trans(h)
    h_ptrs = h_ptr + slots.to(tl.int64)[:, None] * size + columns[None, :]
    if h_desc is not None:
        h_desc.store([slot, pid_n * BLOCK_I], h)
    elif EVEN_I:
        tl.store(h_ptrs, h)
    else:
        tl.store(h_ptrs, h, mask=(columns < size)[None, :])


@triton.jit
def _gated_tile(
    index,
    x_ptr,
    w_desc,
    h_ptr,
    h_desc,
    slots_ptr,
    expert_ids_ptr,
    bias_ptr,
    topk_weights_ptr,
    num_pairs,
    num_m_blocks,
    size,
    K,
    stride_x,
    stride_bias,
    stride_weights,
    top_k,
    alpha,
    limit,
    mul_weight,
    has_bias,
    bias_step,
    up_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXTRAS: tl.constexpr,
    SWAP_AB: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE_X: tl.constexpr,
    GATHER_ALL: tl.constexpr,
    HALF: tl.constexpr,
):
    pid_m, pid_n = tile_at(index, num_m_blocks, tl.cdiv(size, BLOCK_I), GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
    expert = tl.load(expert_ids_ptr + pid_m)
    slot = pid_m * BLOCK_M
    if expert >= 0:
        if HALF:
            if tl.load(slots_ptr + slot + BLOCK_M // 2) >= num_pairs:
                _gated_rows(
                    x_ptr,
                    w_desc,
                    h_ptr,
                    None,
                    slots_ptr,
                    bias_ptr,
                    topk_weights_ptr,
                    slot,
                    expert,
                    pid_n,
                    num_pairs,
                    size,
                    K,
                    stride_x,
                    stride_bias,
                    stride_weights,
                    top_k,
                    alpha,
                    limit,
                    mul_weight,
                    has_bias,
                    bias_step,
                    up_bias,
                    EXTRAS,
                    BLOCK_M // 2,
                    BLOCK_I,
                    BLOCK_K,
                    PARTS,
                    ACTIVATION,
                    SWAP_AB,
                    EVEN_I,
                    EVEN_K,
                    WIDE_X,
                    GATHER_ALL,
                )
            else:
                _gated_rows(
                    x_ptr,
                    w_desc,
                    h_ptr,
                    h_desc,
                    slots_ptr,
                    bias_ptr,
                    topk_weights_ptr,
                    slot,
                    expert,
                    pid_n,
                    num_pairs,
                    size,
                    K,
                    stride_x,
                    stride_bias,
                    stride_weights,
                    top_k,
                    alpha,
                    limit,
                    mul_weight,
                    has_bias,
                    bias_step,
                    up_bias,
                    EXTRAS,
                    BLOCK_M,
                    BLOCK_I,
                    BLOCK_K,
                    PARTS,
                    ACTIVATION,
                    SWAP_AB,
                    EVEN_I,
                    EVEN_K,
                    WIDE_X,
                    GATHER_ALL,
                )
        else:
            _gated_rows(
                x_ptr,
                w_desc,
                h_ptr,
                h_desc,
                slots_ptr,
                bias_ptr,
                topk_weights_ptr,
                slot,
                expert,
                pid_n,
                num_pairs,
                size,
                K,
                stride_x,
                stride_bias,
                stride_weights,
                top_k,
                alpha,
                limit,
                mul_weight,
                has_bias,
                bias_step,
                up_bias,
                EXTRAS,
                BLOCK_M,
                BLOCK_I,
                BLOCK_K,
                PARTS,
                ACTIVATION,
                SWAP_AB,
                EVEN_I,
                EVEN_K,
                WIDE_X,
                GATHER_ALL,
            )


@triton.jit(
    do_not_specialize=[
        "num_pairs",
        "num_m_blocks",
        "stride_bias",
        "stride_weights",
        "top_k",
        "alpha",
        "limit",
        "mul_weight",
        "has_bias",
        "bias_step",
        "up_bias",
    ]
)
def gated_gemm_kernel(
    x_ptr,
    w_desc,
    h_ptr,
    h_desc,
    slots_ptr,
    expert_ids_ptr,
    used_slots_ptr,
    bias_ptr,
    topk_weights_ptr,
    num_pairs,
    num_m_blocks,
    size,
    K,
    stride_x,
    stride_bias,
    stride_weights,
    top_k,
    alpha,
    limit,
    mul_weight,
    has_bias,
    bias_step,
    up_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXTRAS: tl.constexpr,
    SWAP_AB: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE_X: tl.constexpr,
    GATHER_ALL: tl.constexpr,
    HALF: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of h: one a program, or (PERSISTENT) every `num_programs`-th of those in use.

    HALF: a block whose second half is padding computes its first half alone. EXTRAS: there may be routing weights on
    the input, or biases.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if PERSISTENT:
        num_m_blocks = tl.load(used_slots_ptr) // BLOCK_M
        for index in range(tl.program_id(0), num_m_blocks * tl.cdiv(size, BLOCK_I), tl.num_programs(0)):
            _gated_tile(
                index,
                x_ptr,
                w_desc,
                h_ptr,
                h_desc,
                slots_ptr,
                expert_ids_ptr,
                bias_ptr,
                topk_weights_ptr,
                num_pairs,
                num_m_blocks,
                size,
                K,
                stride_x,
                stride_bias,
                stride_weights,
                top_k,
                alpha,
                limit,
                mul_weight,
                has_bias,
                bias_step,
                up_bias,
                BLOCK_M,
                BLOCK_I,
                BLOCK_K,
                GROUP_M,
                PARTS,
                ACTIVATION,
                EXTRAS,
                SWAP_AB,
                EVEN_I,
                EVEN_K,
                WIDE_X,
                GATHER_ALL,
                HALF,
            )
    else:
        _gated_tile(
            tl.program_id(0),
            x_ptr,
            w_desc,
            h_ptr,
            h_desc,
            slots_ptr,
            expert_ids_ptr,
            bias_ptr,
            topk_weights_ptr,
            num_pairs,
            num_m_blocks,
            size,
            K,
            stride_x,
            stride_bias,
            stride_weights,
            top_k,
            alpha,
            limit,
            mul_weight,
            has_bias,
            bias_step,
            up_bias,
            BLOCK_M,
            BLOCK_I,
            BLOCK_K,
            GROUP_M,
            PARTS,
            ACTIVATION,
            EXTRAS,
            SWAP_AB,
            EVEN_I,
            EVEN_K,
            WIDE_X,
            GATHER_ALL,
            HALF,
        )


@dataclass(frozen=True)
class SortedTile:
    """One launch of a GEMM on sorted rows.

    Attributes:
        block_size_m: slots a block, as the alignment pads them.
        block_size_n: columns of the result a block; of the first GEMM twice as many weight rows.
        block_size_k: elements of the inner dimension a step.
        group_size_m: row blocks that share a sweep over the weight rows.
        num_warps: warps a program.
        num_stages: steps in flight.
        swap_ab: weights are the matrix instruction's row operand.
        half: a block whose second half is padding computes its first half alone.
        programs: of a persistent launch; 0: one a tile.
        tma_store: results leave by the copy engine.
    """

    block_size_m: int
    block_size_n: int
    block_size_k: int
    group_size_m: int = 8
    num_warps: int = 8
    num_stages: int = 3
    swap_ab: bool = False
    half: bool = False
    programs: int = 0
    tma_store: bool = False


def gated_gemm(
    h: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    bias: torch.Tensor | None,
    function: ActivationFunction,
    *,
    topk_weights: torch.Tensor,
    mul_weight: bool,
    slots: torch.Tensor,
    expert_ids: torch.Tensor,
    used_slots: torch.Tensor,
    tile: SortedTile,
    pdl: bool = False,
) -> None:
    """Launch the kernel on checked arguments.

    Args:
        h: [slots, I], dense.
        x: [M, H], rows contiguous.
        w13: [E_local, 2I, H] or [E_local, I, H], rows contiguous, on 16 bytes.
        bias: [E_local, 2I] or [E_local, I] in the order of w13's rows, or None.
        function: the activation.
        topk_weights: [M, top_k] float32.
        mul_weight: multiply them into the float32 accumulator.
        slots: the alignment's pairs for `tile.block_size_m`.
        expert_ids: the alignment's experts.
        used_slots: [1] int32.
        tile: the tile choice.
        pdl: launched while the kernel before it still runs, for which it waits.
    """
    size, k = h.shape[1], x.shape[1]
    top_k = topk_weights.shape[1]
    gated = function.kind.is_gated
    m, i = tile.block_size_m, tile.block_size_n
    w_desc = gate_up_tiles(
        w13,
        i,
        tile.block_size_k,
        is_gated=gated,
        interleaved=function.interleaved,
        group=0 if tile.swap_ab else GROUP.value,
    )
    num_m_blocks = expert_ids.shape[0]
    num_tiles = num_m_blocks * cdiv(size, i)
    path.launch(
        gated_gemm_kernel,
        (min(tile.programs, num_tiles) or num_tiles,),
        x,
        w_desc,
        h,
        row_tiles(h, m, i) if tile.tma_store else None,
        slots,
        expert_ids,
        used_slots,
        h if bias is None else bias,
        topk_weights,
        topk_weights.numel(),
        num_m_blocks,
        size,
        k,
        x.stride(0),
        0 if bias is None else bias.stride(0),
        topk_weights.stride(0),
        top_k,
        function.alpha,
        function.limit,
        int(mul_weight),
        int(bias is not None),
        2 if function.interleaved else 1,
        1 if function.interleaved else size,
        BLOCK_M=m,
        BLOCK_I=i,
        BLOCK_K=tile.block_size_k,
        GROUP_M=tile.group_size_m,
        PARTS=2 if gated else 1,
        ACTIVATION=str(function.kind),
        EXTRAS=mul_weight or bias is not None,
        SWAP_AB=tile.swap_ab,
        EVEN_I=size % i == 0,
        EVEN_K=k % tile.block_size_k == 0,
        WIDE_X=x.shape[0] * x.stride(0) >= 2**31,
        GATHER_ALL=not tile.swap_ab,
        HALF=tile.half,
        PERSISTENT=tile.programs > 0,
        PDL=pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({"launch_pdl": True} if pdl else {}),
    )
