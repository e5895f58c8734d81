"""The layer in the two other forms of its kernels (`kernel_form`): which tiles, and what is launched."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict

import torch

from .. import path
from ..align import ExpertAssignment, uses_naive_block_assignment
from ..config import QuantScheme
from ..kernels.block_scaled_gemm import ScaledTile, scaled_gated_gemm, scaled_sorted_gemm
from ..kernels.combine import combine
from ..kernels.gated_gemm import SortedTile, gated_gemm
from ..kernels.sizes import cdiv, next_power_of_2
from ..kernels.sorted_gemm import sorted_gemm
from ..kernels.stream_rows import StreamTile, down_rows, gate_up_rows
from ..once import log_once
from ..platform import Platform, Vendor
from ..quantization import ActivationScale, ExpertsQuantization
from ..tuning.kernel_config import override_in_force
from ..tuning.lookup import FOLDER_VARIABLE
from .base import ExpertsCall
from .kernel_form import (
    FORMS_VARIABLE,
    GENERAL,
    FormChoice,
    FormDecision,
    FormQuestion,
    KernelForm,
    choice_in_force,
    kernel_form,
    lies_on_copy_grid,
)
from .stages import quantize_input

logger = logging.getLogger(__name__)

# Whoever tunes or tests tiles of the general kernels means these to run.
_TILES_ARE_NAMED = FormDecision(KernelForm.GENERAL, "tiles of the general kernels are in force")
# Between so many rows an expert and none, a block's second half is padding often enough to be left out.
_MOST_ROWS_OF_HALVES = 1024


def form_of_call(call: ExpertsCall, dtype: torch.dtype, platform: Platform) -> FormDecision:
    """In which form a call runs.

    Args:
        call: its arguments.
        dtype: of its activations.
        platform: where it runs.
    """
    choice = choice_in_force()
    if choice is FormChoice.GENERAL:
        return GENERAL
    if choice is FormChoice.MEASURED and override_in_force() is not None:
        return _TILES_ARE_NAMED
    weights = call.weights
    num_tokens, top_k = call.topk_ids.shape
    quant = weights.quant
    question = FormQuestion(
        num_pairs=num_tokens * top_k,
        top_k=top_k,
        num_experts=call.global_num_experts,
        num_local_experts=weights.num_local_experts,
        hidden_size=weights.hidden_size,
        intermediate_size=weights.intermediate_size,
        is_gated=call.activation.kind.is_gated,
        dtype=dtype,
        scheme=weights.scheme,
        is_naive=uses_naive_block_assignment(
            num_tokens=num_tokens,
            top_k=top_k,
            global_num_experts=call.global_num_experts,
            has_expert_map=call.expert_map is not None,
            scheme=weights.scheme,
            block_shape=weights.block_shape,
        ),
        has_adapters=call.lora is not None,
        on_copy_grid=lies_on_copy_grid(weights.w13, weights.w2),
        platform=platform,
        scale_block=0 if quant is None else _scale_block(quant),
    )
    decision = kernel_form(question, choice)
    if decision.form is not KernelForm.GENERAL and os.environ.get(FOLDER_VARIABLE):
        log_once(
            logger,
            logging.INFO,
            f"{FOLDER_VARIABLE} is set, and some layers run on {decision.form} rows, whose tiles no file gives; with "
            f"{FORMS_VARIABLE}=general all run on the files' tiles",
        )
    return decision


def _scale_block(quant: ExpertsQuantization) -> int:
    """b where weights and activations are fp8 with a scale for b x b and for b, 0 elsewhere."""
    rows, columns = quant.block_shape or (0, 0)
    is_grouped = quant.scheme is QuantScheme.FP8_W8A8 and quant.activation_scale is ActivationScale.GROUP
    return rows if is_grouped and rows == columns else 0


def streamed_tiles(top_k: int, platform: Platform) -> tuple[StreamTile, StreamTile]:
    """The tiles of both kernels that stream rows.

    The second holds rows of all of a token's experts at a time: so many that together they are 32.
    """
    rows = max(1, 32 // next_power_of_2(top_k))
    if platform.vendor is Vendor.CPU:
        # Under the interpreter small shapes should meet several steps and tiles, with tails.
        return StreamTile(16, 32), StreamTile(rows, 32)
    return StreamTile(8, 512), StreamTile(rows, 256)


def sorted_tiles(
    num_pairs: int, num_experts: int, hidden_size: int, platform: Platform
) -> tuple[SortedTile, SortedTile]:
    """The tiles of both GEMMs on sorted rows; they share the alignment, so also the slots of a block."""
    if platform.vendor is Vendor.CPU:
        return SortedTile(32, 32, 32, half=True), SortedTile(32, 64, 32, half=True)
    half = num_pairs < _MOST_ROWS_OF_HALVES * num_experts
    # Rows that do not start on 32 bytes are stored by so many instructions that a wide tile would spill.
    columns = 128 if hidden_size % 16 else 256
    return (
        SortedTile(128, 128, 64, num_stages=4, half=half),
        SortedTile(128, columns, 64, num_stages=4 if half else 3, half=half),
    )


def scaled_tiles(platform: Platform) -> tuple[ScaledTile, ScaledTile]:
    """The tiles of both GEMMs on sorted rows in fp8 with scales of blocks; they share the slots of a block."""
    if platform.vendor is Vendor.CPU:
        return ScaledTile(32), ScaledTile(32, group_size_m=2)
    # The smallest tiles were the fastest: what counts is how many programs a multiprocessor holds, 2 and 3 of these.
    return ScaledTile(64, group_size_m=1, num_warps=4, num_stages=4), ScaledTile(64, group_size_m=1, num_warps=4)


def run_streamed(out: torch.Tensor, call: ExpertsCall, platform: Platform) -> None:
    """Two matrix-vector kernels write the layer into `out [M, H]`; arguments are as `StandardExperts.apply` has them.

    Rounding points are those of the general kernels.
    """
    weights = call.weights
    first, second = streamed_tiles(call.topk_ids.shape[1], platform)
    # The second kernel may be launched while the first one runs, and waits for it before it reads what that writes.
    starts_early = platform.is_hopper
    routing = {
        "topk_ids": call.topk_ids,
        "topk_weights": call.topk_weights,
        "expert_map": call.expert_map,
        "num_experts": call.global_num_experts,
    }
    hidden = torch.empty((call.topk_ids.numel(), weights.intermediate_size), dtype=out.dtype, device=out.device)
    gate_up_rows(
        hidden,
        call.hidden_states,
        weights.w13,
        weights.w13_bias,
        call.activation,
        mul_weight=call.apply_router_weight_on_input,
        tile=first,
        triggers=starts_early,
        **routing,
    )
    down_rows(
        out,
        hidden,
        weights.w2,
        weights.w2_bias,
        mul_weight=not call.apply_router_weight_on_input,
        tile=second,
        pdl=starts_early,
        **routing,
    )


def run_sorted(
    out: torch.Tensor,
    call: ExpertsCall,
    assignment: ExpertAssignment,
    tiles: tuple[SortedTile, SortedTile],
    platform: Platform,
) -> None:
    """Two GEMMs on rows in the alignment's order and the sum write the layer into `out [M, H]`.

    Rounding points are those of the general kernels.

    Args:
        out: as `StandardExperts.apply` has it.
        call: likewise.
        assignment: aligned to `tiles[0].block_size_m`.
        tiles: of the two GEMMs.
        platform: where it runs.
    """
    weights = call.weights
    slots, expert_ids, used_slots = (
        assignment.sorted_token_ids,
        assignment.expert_ids,
        assignment.num_tokens_post_padded,
    )
    if slots is None or expert_ids is None or used_slots is None:
        raise AssertionError("sorted rows without an alignment")
    routing = {
        "topk_weights": call.topk_weights,
        "slots": slots,
        "expert_ids": expert_ids,
        "used_slots": used_slots,
    }
    _note_tiles(tiles)
    num_pairs = call.topk_ids.numel()
    hidden = torch.empty((slots.shape[0], weights.intermediate_size), dtype=out.dtype, device=out.device)
    expert_output = torch.empty((num_pairs, weights.hidden_size), dtype=out.dtype, device=out.device)
    gated_gemm(
        hidden,
        call.hidden_states,
        weights.w13,
        weights.w13_bias,
        call.activation,
        mul_weight=call.apply_router_weight_on_input,
        tile=tiles[0],
        **routing,
    )
    sorted_gemm(
        expert_output,
        hidden,
        weights.w2,
        weights.w2_bias,
        mul_weight=not call.apply_router_weight_on_input,
        is_sorted=False,
        tile=tiles[1],
        **routing,
    )
    _add_up(out, expert_output, call, platform)


def run_scaled(
    out: torch.Tensor,
    call: ExpertsCall,
    assignment: ExpertAssignment,
    tiles: tuple[ScaledTile, ScaledTile],
    platform: Platform,
) -> None:
    """Quantise, two GEMMs on rows in the alignment's order and the sum write a layer of fp8 blocks into `out [M, H]`.

    Rounding points are those of the general kernels.

    Args:
        out: as `StandardExperts.apply` has it.
        call: likewise.
        assignment: aligned to the tiles' `block_size_m`.
        tiles: of the two GEMMs.
        platform: where it runs.
    """
    weights, quant = call.weights, call.weights.quant
    slots, expert_ids = assignment.sorted_token_ids, assignment.expert_ids
    if slots is None or expert_ids is None or quant is None or quant.block_shape is None:
        raise AssertionError("sorted rows of fp8 blocks without an alignment or without blocks")
    _note_tiles(tiles, quant.block_shape)
    path.note("promoted_every", quant.block_shape[1])
    x, x_scale = quantize_input(call.hidden_states, weights, scale=call.input_scale)
    if x_scale is None:
        raise AssertionError("sorted rows of fp8 blocks without scales")
    routing = {
        "topk_weights": call.topk_weights,
        "slots": slots,
        "expert_ids": expert_ids,
        "block_shape": quant.block_shape,
    }
    num_slots, size = slots.shape[0], weights.intermediate_size
    hidden = torch.empty((num_slots, size), dtype=x.dtype, device=out.device)
    hidden_scale = torch.empty((num_slots, cdiv(size, quant.block_shape[1])), dtype=torch.float32, device=out.device)
    expert_output = torch.empty((call.topk_ids.numel(), weights.hidden_size), dtype=out.dtype, device=out.device)
    scaled_gated_gemm(
        hidden,
        hidden_scale,
        x,
        x_scale,
        weights.w13,
        quant.w13_scale,
        weights.w13_bias,
        call.activation,
        storage=out.dtype,
        mul_weight=call.apply_router_weight_on_input,
        tile=tiles[0],
        **routing,
    )
    scaled_sorted_gemm(
        expert_output,
        hidden,
        hidden_scale,
        weights.w2,
        quant.w2_scale,
        weights.w2_bias,
        mul_weight=not call.apply_router_weight_on_input,
        tile=tiles[1],
        **routing,
    )
    _add_up(out, expert_output, call, platform)


def _add_up(out: torch.Tensor, expert_output: torch.Tensor, call: ExpertsCall, platform: Platform) -> None:
    combine(
        out,
        expert_output,
        call.topk_ids,
        call.expert_map,
        call.global_num_experts,
        call.weights.num_local_experts,
        platform,
    )


def _note_tiles(
    tiles: tuple[SortedTile, SortedTile] | tuple[ScaledTile, ScaledTile], block_shape: tuple[int, int] | None = None
) -> None:
    """Record the tiles of both GEMMs, whose columns and steps are a block of scales; built where somebody listens."""
    if path.is_recording():
        sizes = {} if block_shape is None else {"block_size_n": block_shape[0], "block_size_k": block_shape[1]}
        for name, tile in zip(("config", "config_w2"), tiles, strict=True):
            path.note(name, asdict(tile) | sizes | {"source": "sorted rows"})
