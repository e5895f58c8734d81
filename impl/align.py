"""Which rows of the grouped GEMM belong to which expert: the alignment, and the choice to do without one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import path
from .checks import debug_expect_expert_map, debug_expect_ids, expect_int, expect_tensor
from .config import QuantScheme
from .kernels import align as align_kernels
from .kernels.device import current_device
from .platform import Platform

IDS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class ExpertAssignment:
    """How pairs reach the grouped GEMM.

    Attributes:
        sorted_token_ids: [blocks * block_size] int32 pairs by expert, padded with M * top_k; None for naive blocks.
        expert_ids: [blocks] int32 local expert of each block, -1 for unused ones; None for naive blocks.
        num_tokens_post_padded: [1] int32 slots in use; None for naive blocks.
    """

    sorted_token_ids: torch.Tensor | None = None
    expert_ids: torch.Tensor | None = None
    num_tokens_post_padded: torch.Tensor | None = None

    @property
    def is_naive(self) -> bool:
        """Whether every pair is a block of its own."""
        return self.sorted_token_ids is None


def uses_naive_block_assignment(
    *,
    num_tokens: int,
    top_k: int,
    global_num_experts: int,
    has_expert_map: bool,
    scheme: QuantScheme = QuantScheme.NONE,
    block_shape: tuple[int, int] | None = None,
) -> bool:
    """Whether each pair becomes a block of its own, so that nothing is sorted.

    With few pairs on many experts hardly two share one, and the alignment's launches cost more than the weights read
    twice. The condition is vLLM's (PR 39016): no expert map, M * top_k * 4 <= E, and not an integer weight-only scheme
    with scales grouped along K, whose kernel has no such mode.
    """
    weight_only = scheme in (QuantScheme.INT8_W8A16, QuantScheme.INT4_W4A16)
    grouped = weight_only and block_shape is not None and block_shape[1] > 0
    return not has_expert_map and num_tokens * top_k * 4 <= global_num_experts and not grouped


def prepare_expert_assignment(
    topk_ids: torch.Tensor,
    *,
    block_size: int,
    num_local_experts: int,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    scheme: QuantScheme = QuantScheme.NONE,
    block_shape: tuple[int, int] | None = None,
) -> ExpertAssignment:
    """Assign pairs to blocks, by alignment or naively; the one place where that is decided. Arguments are checked.

    Args:
        topk_ids: [M, top_k], M at least 1.
        block_size: pairs a block.
        num_local_experts: experts of this rank.
        global_num_experts: E.
        expert_map: [E] int32 global to local, or None.
        scheme: the layer's quantisation.
        block_shape: of its scales.
    """
    num_tokens, top_k = topk_ids.shape
    if uses_naive_block_assignment(
        num_tokens=num_tokens,
        top_k=top_k,
        global_num_experts=global_num_experts,
        has_expert_map=expert_map is not None,
        scheme=scheme,
        block_shape=block_shape,
    ):
        path.note("assignment", "naive")
        return ExpertAssignment()
    path.note("assignment", "aligned")
    return ExpertAssignment(
        *align_kernels.align(topk_ids, block_size, global_num_experts, num_local_experts, expert_map)
    )


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort routed pairs by expert and pad each expert's run to whole blocks.

    Pair p is choice p % top_k of token p // top_k. The sort is stable, and nothing waits for the device: the results
    have their worst-case size.

    Args:
        topk_ids: [M, top_k] int32 or int64 global expert ids; -1 is no expert.
        block_size: slots a block, a power of two.
        num_experts: E, the global number of experts.
        expert_map: [E] int32, global to local expert id, -1 for experts of other ranks; None where all are local.

    Returns:
        sorted_token_ids: [blocks * block_size] int32. Each local expert's pairs in ascending order, padded with
            M * top_k to a multiple of block_size, expert after expert. Pairs without a local expert are left out.
        expert_ids: [blocks] int32, the local expert of each block; -1 behind the last block in use.
        num_tokens_post_padded: [1] int32, slots in use.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or range, by name; in debug mode also
            ids outside [-1, E) and maps with a local id twice.
        RuntimeError: a device on which Triton does not run.

    The layout is that of vLLM's operator of the same name.
    """
    expect_tensor("topk_ids", topk_ids, shape=("M", "top_k"), dtypes=IDS)
    expect_int("num_experts", num_experts, low=1)
    expect_block_size(block_size)
    if topk_ids.shape[1] < 1:
        raise ValueError(f"topk_ids: expected top_k of at least 1, got shape {list(topk_ids.shape)}")
    if expert_map is not None:
        expect_tensor("expert_map", expert_map, shape=(num_experts,), dtypes=(torch.int32,), like=topk_ids)
    if topk_ids.numel() + num_experts * block_size >= 2**31:
        raise ValueError(f"topk_ids: expected fewer than 2^31 slots, got {topk_ids.numel()} pairs")
    if not Platform.of(topk_ids.device).runs_triton:
        raise RuntimeError(f"topk_ids: expected a device on which Triton runs, got {topk_ids.device}")
    debug_expect_ids("topk_ids", topk_ids, num_experts)
    if expert_map is not None:
        debug_expect_expert_map("expert_map", expert_map, num_experts)
    if topk_ids.shape[0] == 0:
        empty = topk_ids.new_empty(0, dtype=torch.int32)
        return empty, empty.clone(), topk_ids.new_zeros(1, dtype=torch.int32)
    with current_device(topk_ids):
        return align_kernels.align(topk_ids, block_size, num_experts, num_experts, expert_map)


def expect_block_size(block_size: int) -> None:
    """Check a block size: a power of two in [1, 1024].

    Raises:
        TypeError, ValueError: anything else.
    """
    expect_int("block_size", block_size, low=1, high=1024)
    if block_size & (block_size - 1):
        raise ValueError(f"block_size: expected a power of two, got {block_size}")
