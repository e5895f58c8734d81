"""The routed experts as an operator of torch, which a compiler takes whole: its shape is known without running it.

`torch.compile` sees `moegate::fused_experts` where a module of moegate calls the experts, and breaks no graph for it.
Arguments are flat, as operators' are; `fused_experts` documents and checks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .config import QuantScheme
from .fused_moe import fused_experts
from .quantization import ExpertsQuantization


@torch.library.custom_op("moegate::fused_experts", mutates_args=())
def fused_experts_op(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
    w13_zero_point: torch.Tensor | None,
    w2_zero_point: torch.Tensor | None,
    a13_scale: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    scheme: str,
    block_shape: Sequence[int] | None,
    per_act_token_quant: bool,
    activation: str,
    swiglu_alpha: float,
    swiglu_limit: float,
    interleaved: bool,
    apply_router_weight_on_input: bool,
    global_num_experts: int | None,
    backend: str,
    allow_tf32: bool,
) -> torch.Tensor:
    """`fused_experts`, with `quant` in its parts; scheme "none" means that there is none."""
    quant = None
    if scheme != QuantScheme.NONE:
        if w13_scale is None or w2_scale is None:
            raise ValueError(f"w13_scale, w2_scale: expected the scales of scheme {scheme}, got None")
        quant = ExpertsQuantization(
            scheme=QuantScheme(scheme),
            w13_scale=w13_scale,
            w2_scale=w2_scale,
            w13_zero_point=w13_zero_point,
            w2_zero_point=w2_zero_point,
            block_shape=None if block_shape is None else (block_shape[0], block_shape[1]),
            a13_scale=a13_scale,
            a2_scale=a2_scale,
            per_act_token_quant=per_act_token_quant,
        )
    return fused_experts(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        quant=quant,
        activation=activation,
        swiglu_alpha=swiglu_alpha,
        swiglu_limit=swiglu_limit,
        interleaved=interleaved,
        apply_router_weight_on_input=apply_router_weight_on_input,
        expert_map=expert_map,
        global_num_experts=global_num_experts,
        backend=backend,
        allow_tf32=allow_tf32,
    )


@fused_experts_op.register_fake
def _fused_experts_fake(hidden_states: torch.Tensor, *arguments: Any) -> torch.Tensor:
    del arguments
    return hidden_states.new_empty(hidden_states.shape)


def quantization_arguments(quant: ExpertsQuantization | None) -> tuple[Any, ...]:
    """The operator's nine arguments from `w13_scale` to `per_act_token_quant`."""
    if quant is None:
        return (None,) * 6 + (str(QuantScheme.NONE), None, False)
    shape = None if quant.block_shape is None else list(quant.block_shape)
    return (*quant.tensors().values(), str(quant.scheme), shape, quant.per_act_token_quant)
