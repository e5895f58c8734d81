"""The routed experts of one rank as one function."""

from __future__ import annotations

import os

import torch

from . import path
from .align import IDS
from .checks import (
    FLOATS,
    debug_expect_expert_map,
    debug_expect_ids,
    debug_expect_no_nan,
    expect_activation,
    expect_apart,
    expect_bool,
    expect_int,
    expect_tensor,
)
from .config import Activation, ActivationFormat
from .experts.base import ExpertsCall
from .experts.kernel_form import choice_in_force
from .kernels.device import current_device
from .lora.table import AdapterTable, expect_token_adapters
from .oracle.call import experts_of_call
from .oracle.select import ENVIRONMENT_VARIABLE
from .platform import Platform
from .quantization import ActivationScale, ExpertsQuantization
from .replay import replayable
from .tuning.kernel_config import override_in_force
from .tuning.lookup import FOLDER_VARIABLE
from .weights import debug_expect_scales, expect_experts_weights


def what_decides() -> tuple[object, ...]:
    """What decides on a call beside its arguments."""
    asked = os.environ.get(ENVIRONMENT_VARIABLE), os.environ.get(FOLDER_VARIABLE)
    return (*asked, override_in_force(), choice_in_force())


@replayable(what_decides)
def fused_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    quant: ExpertsQuantization | None = None,
    activation: Activation | str = Activation.SILU,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    interleaved: bool = False,
    apply_router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    global_num_experts: int | None = None,
    adapters: AdapterTable | None = None,
    lora_ids: torch.Tensor | None = None,
    backend: str = "auto",
    allow_tf32: bool = False,
    dp_size: int = 1,
    input_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The routed experts' weighted sum: `out[t] = sum_j weight[t, j] * (w2[e] @ act(gate, up) + b2[e])`, e = ids[t, j].

    gate and up are the upper and lower half of `w13[e] @ hidden_states[t] + b13[e]` (Shazeer, arXiv 2002.05202); an
    activation without a gate takes all of it. A pair whose id is -1, or whose expert another rank holds, adds nothing;
    a token without any pair gets zeros. Nothing waits for the device, so the call can be captured in a CUDA graph.
    Last dimensions are contiguous; rows may be strided. Scales are contiguous.

    Args:
        hidden_states: [M, H] bfloat16, float16 or float32 (quantised: bfloat16 or float16).
        w13: [E_local, 2I, H] of the same dtype, gate rows first, then up; [E_local, I, H] for an activation without a
            gate. Quantised: of the dtype that `quant` says.
        w2: [E_local, H, I] as w13.
        topk_weights: [M, top_k] float32, not NaN.
        topk_ids: [M, top_k] int32 or int64, global ids in [-1, E).
        w13_bias: [E_local, 2I] in the order of w13's rows, of the activations' dtype or float32; the routing weight
            does not multiply it.
        w2_bias: [E_local, H] likewise; the routing weight multiplies it, unless that is on the input.
        quant: how w13 and w2 are stored (`ExpertsQuantization`); None where they are of the activations' dtype.
        activation: between the two GEMMs.
        swiglu_alpha: of swigluoai (`ActivationFunction`).
        swiglu_limit: of swigluoai.
        interleaved: w13's gate and up rows alternate, from gate 0 on; not with scales in blocks.
        apply_router_weight_on_input: weights multiply the experts' input instead of their output; top_k must be 1.
        expert_map: [E] int32, global to local id, -1 for experts of other ranks; None where all are local.
        global_num_experts: E; None takes it from `expert_map` or `w13`.
        adapters: the layer's LoRA adapters; with a table the Triton backend runs on a GPU, whatever is asked for.
        lora_ids: [M] int32, the slot of each token's adapter, -1 for none; None where no token has one, which then
            costs nothing. An id that is no slot adds nothing.
        backend: a backend's name, honoured or refused; "auto" leaves it to `MOEGATE_BACKEND`, and to the oracle where
            that is not set (`moegate explain`).
        allow_tf32: float32 operands may be rounded to TF32; without it they are multiplied as they are.
        dp_size: ranks with their own tokens, whose tokens may be among these: the oracle asks.
        input_scale: of hidden states that come quantised, as `quantize_activations` gives them with the scales that
            `quant` says, dense; the activations' dtype is then that of `out`, which must be given. Adapters see
            them times their scales, rounded to that dtype.
        out: [M, H] of the same dtype to write into; None allocates it. It may not overlap an input.

    Returns:
        [M, H] in the dtype of the activations; `out` where given.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device, layout or range, by name, before
            anything is launched; in debug mode (`checks.debug_checks`) also ids outside [-1, E), NaN weights, maps
            with values outside [-1, E_local) or a local id twice, scales that are not positive and finite, and
            lora_ids of slots that hold nothing.
    """
    function = expect_activation(activation, swiglu_alpha, swiglu_limit, interleaved)
    expect_bool("apply_router_weight_on_input", apply_router_weight_on_input)
    expect_bool("allow_tf32", allow_tf32)
    expect_int("dp_size", dp_size, low=1)
    like = hidden_states if input_scale is None else _expect_quantized(hidden_states, input_scale, quant, out)
    if input_scale is None:
        expect_tensor("hidden_states", hidden_states, shape=("M", "H"), dtypes=FLOATS)
    num_tokens, hidden_size = hidden_states.shape
    dtypes = (like.dtype,)
    weights = expect_experts_weights(like, "E_local", w13, w2, w13_bias, w2_bias, quant, function)
    num_local_experts = weights.num_local_experts
    expect_tensor("topk_ids", topk_ids, shape=(num_tokens, "top_k"), dtypes=IDS, like=hidden_states)
    top_k = topk_ids.shape[1]
    expect_tensor("topk_weights", topk_weights, shape=(num_tokens, top_k), dtypes=(torch.float32,), like=hidden_states)
    num_experts = _check_num_experts(expert_map, global_num_experts, num_local_experts, hidden_states)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"topk_ids: expected top_k in [1, {num_experts}] (the number of experts), got {top_k}")
    if apply_router_weight_on_input and top_k != 1:
        raise ValueError(f"apply_router_weight_on_input: expected top_k 1, got {top_k}")
    # Positions in the alignment are 32-bit, and a block is at most 256 of them.
    if num_tokens * top_k + 256 * num_local_experts >= 2**31:
        raise ValueError(f"topk_ids: expected fewer than 2^31 pairs and padding, got {num_tokens} x {top_k}")
    lora = expect_token_adapters(
        adapters, lora_ids, (num_tokens,), num_local_experts, like, weights.intermediate_size, function
    )
    experts = experts_of_call(
        backend,
        Platform.of(hidden_states.device),
        ActivationFormat.STANDARD,
        num_experts,
        top_k,
        hidden_size,
        weights.intermediate_size,
        like.dtype,
        weights.scheme,
        weights.block_shape,
        function.kind,
        weights.has_bias,
        apply_router_weight_on_input,
        adapters is not None,
        dp_size,
    )
    if out is None:
        out = torch.empty((num_tokens, hidden_size), dtype=hidden_states.dtype, device=hidden_states.device)
    else:
        expect_tensor("out", out, shape=(num_tokens, hidden_size), dtypes=dtypes, like=hidden_states)
        expect_apart(
            "out",
            out,
            hidden_states=hidden_states,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            expert_map=expert_map,
            lora_ids=lora_ids,
            input_scale=input_scale,
            **weights.tensors(),
        )
    debug_expect_ids("topk_ids", topk_ids, num_experts)
    debug_expect_no_nan("topk_weights", topk_weights)
    if expert_map is not None:
        debug_expect_expert_map("expert_map", expert_map, num_local_experts)
    debug_expect_scales(quant)
    if lora is not None:
        lora.table.debug_expect_ids("lora_ids", lora.lora_ids)

    path.note("backend", experts.backend)
    if num_tokens == 0:
        return out
    if num_local_experts == 0:
        return out.zero_()
    call = ExpertsCall(
        hidden_states,
        weights,
        topk_weights,
        topk_ids,
        function,
        apply_router_weight_on_input,
        expert_map,
        num_experts,
        allow_tf32,
        lora,
        input_scale,
    )
    with current_device(hidden_states):
        experts.apply(out, call)
    return out


def _expect_quantized(
    hidden_states: torch.Tensor,
    input_scale: torch.Tensor,
    quant: ExpertsQuantization | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check hidden states that come quantised; returns [0, H] of the activations' dtype."""
    if not isinstance(quant, ExpertsQuantization) or quant.activation_dtype is None:
        raise ValueError("input_scale: expected None where quant quantises no activations, got a tensor")
    if out is None:
        raise ValueError("out: expected a tensor of the activations' dtype beside input_scale, got None")
    expect_tensor("hidden_states", hidden_states, shape=("M", "H"), dtypes=(quant.activation_dtype,), contiguous=True)
    num_tokens, hidden_size = hidden_states.shape
    match quant.activation_scale:
        case ActivationScale.TOKEN:
            shape: tuple[int, ...] = (num_tokens, 1)
        case ActivationScale.GROUP:
            shape = (num_tokens, -(-hidden_size // quant.group))
        case _:
            shape = (1,)
    expect_tensor("input_scale", input_scale, shape=shape, dtypes=(torch.float32,), like=hidden_states, contiguous=True)
    return torch.empty((0, hidden_size), dtype=out.dtype, device=hidden_states.device)


def _check_num_experts(
    expert_map: torch.Tensor | None, global_num_experts: int | None, num_local_experts: int, like: torch.Tensor
) -> int:
    if global_num_experts is not None:
        expect_int("global_num_experts", global_num_experts, low=1)
    if expert_map is None:
        if global_num_experts not in (None, num_local_experts):
            raise ValueError(
                f"global_num_experts: expected w13's {num_local_experts} without an expert_map, "
                f"got {global_num_experts}"
            )
        return num_local_experts
    shape = ("E" if global_num_experts is None else global_num_experts,)
    expect_tensor("expert_map", expert_map, shape=shape, dtypes=(torch.int32,), like=like)
    return expert_map.shape[0]
