"""vLLM's public Triton experts, `fused_experts`, with its `fused_topk` and `moe_align_block_size`.

Imported only when a run asks for them. vLLM wants a current configuration around its layers; none of its defaults is
changed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..cases import AlignCase, ExpertsCase, RoutingCase
from ..numerics import Numerics
from ..spec import ROUTINGS
from ..subject import Capabilities, Subject

_LAYERS = "vllm.model_executor.layers.fused_moe"


class VllmSubject(Subject):
    """`fused_experts`, unquantised and in fp8 blocks, on an NVIDIA or AMD GPU."""

    name = "vllm"
    variants = ("triton",)
    last_run = (
        "vllm 0.33.0 on an H200, 2026-11-30: experts and alignment, its kernels and launches apart from the engine"
    )
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=("bfloat16", "float16"),
        routings=tuple(routing for routing in ROUTINGS if routing != "repeated"),
        logits=("unit", "wide", "negative"),
        schemes=("none", "fp8_block"),
        padded_rows=False,
        # A grid of no programs is an error of CUDA's, its alignment sorts fewer than 1,024 experts in runs of 32, and
        # its quantiser takes whole groups of 128.
        empty=False,
        max_experts=992,
        hidden_multiple=128,
        intermediate_multiple=128,
    )
    # Its activation multiplies a gate of the activations' dtype by up.
    numerics = Numerics(gate="storage", accumulator="hopper_fp8")

    standalone = """
from vllm.model_executor.layers.fused_moe import fused_experts
from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
quant = {}
if "w13_scale" in more:
    shape = list(more["block_shape"])
    quant["quant_config"] = fp8_w8a8_moe_quant_config(more["w13_scale"], more["w2_scale"], block_shape=shape)
return fused_experts(hidden_states, w13, w2, topk_weights, topk_ids, expert_map=more.get("expert_map"),
                     global_num_experts=more["num_experts"],
                     apply_router_weight_on_input=more["apply_router_weight_on_input"], **quant)
"""

    def align(self, case: AlignCase, variant: str) -> tuple[Tensor, Tensor, Tensor]:
        """`moe_align_block_size`, without rows for pairs of remote experts."""
        from importlib import import_module

        align: Any = import_module(f"{_LAYERS}.moe_align_block_size").moe_align_block_size
        return align(case.topk_ids, case.block_size, case.num_experts, case.expert_map, ignore_invalid_experts=True)

    def route(self, case: RoutingCase, variant: str) -> tuple[Tensor, Tensor]:
        """`fused_topk`, which looks at the hidden states' rows alone."""
        from importlib import import_module

        topk: Any = import_module(_LAYERS).fused_topk
        logits = case.router_logits
        weights, ids, *_ = topk(logits, logits, case.top_k, case.renormalize)
        return weights, ids.int()

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """`fused_experts`, never in place."""
        from importlib import import_module

        layers: Any = import_module(_LAYERS)
        options: dict[str, Any] = {}
        if case.stored is not None:
            config: Any = import_module(f"{_LAYERS}.config").fp8_w8a8_moe_quant_config
            shape = list(case.stored.block_shape or ())
            options["quant_config"] = config(
                w1_scale=case.stored.w13_scale, w2_scale=case.stored.w2_scale, block_shape=shape
            )
        return layers.fused_experts(
            case.hidden_states,
            case.w13,
            case.w2,
            case.topk_weights,
            case.topk_ids,
            apply_router_weight_on_input=case.apply_router_weight_on_input,
            global_num_experts=case.num_experts,
            expert_map=case.expert_map,
            **options,
        )
