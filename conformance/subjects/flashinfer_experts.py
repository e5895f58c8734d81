"""FlashInfer's public `cutlass_fused_moe`; imported, and its module compiled (for minutes), only when a run asks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..cases import ExpertsCase, LayerCase
from ..numerics import Numerics
from ..spec import ROUTINGS
from ..subject import Capabilities, Subject

_ACTIVATIONS = {
    "silu": "Swiglu",
    "gelu": "Geglu",
    "silu_no_mul": "Silu",
    "gelu_no_mul": "Gelu",
    "relu2_no_mul": "Relu2",
}


class FlashinferSubject(Subject):
    """`flashinfer.fused_moe.cutlass_fused_moe` on weights of the activations' dtype, on a GPU of sm_89 or later."""

    name = "flashinfer"
    variants = ("cutlass",)
    last_run = "untested (written for flashinfer-python 0.7)"
    # Intermediate sizes that 128 does not divide have hung (https://github.com/vllm-project/vllm/pull/51492).
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=("bfloat16", "float16"),
        routings=tuple(r for r in ROUTINGS if r not in ("repeated", "some_invalid", "all_invalid")),
        maps=("none",),
        activations=tuple(_ACTIVATIONS),
        weight_on_input=False,
        padded_rows=False,
        empty=False,
        hidden_multiple=128,
        intermediate_multiple=128,
    )
    numerics = Numerics()

    standalone = """
from flashinfer.fused_moe import cutlass_fused_moe
gate, up = w13.chunk(2, dim=1)  # of a gated activation, Swiglu by default
result = cutlass_fused_moe(hidden_states, topk_ids, topk_weights, torch.cat((up, gate), dim=1), w2,
                           hidden_states.dtype, quant_scales=[], use_fused_finalize=False)
return result[0] if isinstance(result, (list, tuple)) else result
"""

    def prepare(self, case: LayerCase, variant: str) -> Tensor:
        """w13 with the up rows first, as the kernel reads it."""
        if not case.activation.is_gated:
            return case.w13
        gate, up = case.w13.chunk(2, dim=1)
        return torch.cat((up, gate), dim=1)

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """`cutlass_fused_moe` with its sum over the top-k in a kernel of its own: the fused one repeats no result."""
        fused_moe: Any = import_module("flashinfer.fused_moe")
        result = fused_moe.cutlass_fused_moe(
            case.hidden_states,
            case.topk_ids,
            case.topk_weights,
            case.prepared,
            case.w2,
            case.hidden_states.dtype,
            quant_scales=[],
            activation_type=getattr(fused_moe.ActivationType, _ACTIVATIONS[case.activation.name]),
            use_fused_finalize=False,
        )
        return result[0] if isinstance(result, (list, tuple)) else result
