"""SGLang's public Triton experts, `fused_experts` with a `StandardTopKOutput`.

Imported only when a run asks for them. Its layers read server arguments from the process; where none are set, defaults
are.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from ..cases import ExpertsCase
from ..numerics import Numerics
from ..spec import ROUTINGS
from ..subject import Capabilities, Subject

_MOE = "sglang.srt.layers.moe"


class SglangSubject(Subject):
    """`fused_experts`, unquantised and in fp8 blocks, on a GPU."""

    name = "sglang"
    variants = ("triton",)
    last_run = "untested (written for sglang 0.5.19)"
    # Its dispatchers hand over local ids: a rank's map is not its experts' affair.
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=("bfloat16", "float16"),
        routings=tuple(r for r in ROUTINGS if r not in ("repeated", "some_invalid", "all_invalid")),
        maps=("none",),
        schemes=("none", "fp8_block"),
        padded_rows=False,
        empty=False,
        hidden_multiple=16,
        intermediate_multiple=16,
    )
    numerics = Numerics(accumulator="hopper_fp8")

    def __init__(self) -> None:
        self._has_arguments = False

    def _set_arguments(self) -> None:
        """Defaults for whatever reads the server's arguments."""
        if not self._has_arguments:
            arguments: Any = import_module("sglang.srt.server_args")
            arguments.set_global_server_args_for_scheduler(arguments.ServerArgs(model_path="dummy"))
            self._has_arguments = True

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """`fused_experts`, never in place."""
        self._set_arguments()
        fused_experts: Any = import_module(f"{_MOE}.fused_moe_triton").fused_experts
        topk_output: Any = import_module(f"{_MOE}.topk").StandardTopKOutput
        runner: Any = import_module(f"{_MOE}.moe_runner").MoeRunnerConfig
        options: dict[str, Any] = {}
        if case.stored is not None:
            options = {"use_fp8_w8a8": True, "w1_scale": case.stored.w13_scale, "w2_scale": case.stored.w2_scale}
            options["block_shape"] = list(case.stored.block_shape or ())
        config = runner(
            num_experts=case.num_experts,
            num_local_experts=case.num_local_experts,
            activation="silu",
            inplace=False,
            apply_router_weight_on_input=case.apply_router_weight_on_input,
        )
        logits = case.topk_weights.new_empty(case.num_tokens, case.num_experts)
        routed = topk_output(case.topk_weights, case.topk_ids, logits)
        return fused_experts(case.hidden_states, case.w13, case.w2, routed, config, **options)
