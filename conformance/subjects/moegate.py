"""moegate's own implementation under its own suite. In `conformance`, `impl` is known to the `moegate*` files alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor

from ...impl.align import moe_align_block_size
from ...impl.batched import batched_experts
from ...impl.checks import debug_checks
from ...impl.fused_moe import fused_experts
from ...impl.path import PathRecord, record_path
from ...impl.platform import Platform
from ...impl.routing import select_experts
from ..cases import AlignCase, BatchedCase, ExpertsCase, RoutingCase
from ..numerics import Numerics
from ..properties.path import Launches
from ..subject import ROUTING_METHODS, Capabilities, Subject
from .moegate_configs import MoegateConfigs
from .moegate_oracle import MoegateOracle

_LAYER = {"grouped_gemm_kernel": 2, "silu_and_mul_kernel": 1, "combine_kernel": 1}
_ALIGNED = {"align_place_kernel": 1, **_LAYER}
# Past a few thousand pairs the counting is a launch of its own.
_ALIGNED_LARGE = {"align_count_kernel": 1, **_ALIGNED}

_BATCHED = {"batched_gemm_kernel": 2, "batched_silu_and_mul_kernel": 1}


class MoegateSubject(Subject):
    """`fused_experts`, `select_experts` and `moe_align_block_size`, on each backend of the device."""

    name = "moegate"
    variants = ("triton", "cpu")
    capabilities = Capabilities(**ROUTING_METHODS)
    numerics = Numerics()
    launches: ClassVar[dict[str, Launches]] = {
        "triton": {"naive": (_LAYER,), "aligned": (_ALIGNED, _ALIGNED_LARGE), "batched": (_BATCHED,)}
    }

    def unavailable(self, variant: str, device: str) -> str | None:
        """The CPU backend runs on the CPU; Triton on a GPU, or on a CPU under its interpreter."""
        if variant == "cpu":
            return None if device == "cpu" else "the cpu backend runs on the CPU"
        if not Platform.of(device).runs_triton:
            return (
                "Triton needs a GPU, or its interpreter: run `moegate check`, or set TRITON_INTERPRET=1 "
                "before Python starts"
            )
        return None

    def facets(self, variant: str) -> tuple[str, ...]:
        """The CPU backend neither aligns nor launches kernels, and takes the standard format alone."""
        lacks = ("align", "batched", "launches") if variant == "cpu" else ()
        return tuple(f for f in super().facets(variant) if f not in lacks)

    def route(self, case: RoutingCase, variant: str) -> tuple[Tensor, Tensor]:
        """`select_experts`."""
        backend = "triton" if variant == "triton" else "torch"
        with debug_checks():
            return select_experts(case.router_logits, case.top_k, **case.method(), backend=backend)

    def align(self, case: AlignCase, variant: str) -> tuple[Tensor, Tensor, Tensor]:
        """`moe_align_block_size`."""
        with debug_checks():
            return moe_align_block_size(case.topk_ids, case.block_size, case.num_experts, case.expert_map)

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """`fused_experts` on the backend named by `variant`, with the checks that synchronise the device."""
        with debug_checks():
            return fused_experts(
                case.hidden_states,
                case.w13,
                case.w2,
                case.topk_weights,
                case.topk_ids,
                activation=case.activation,
                apply_router_weight_on_input=case.apply_router_weight_on_input,
                expert_map=case.expert_map,
                global_num_experts=case.num_experts,
                backend=variant,
            )

    def batched(self, case: BatchedCase, variant: str, out: Tensor | None) -> Tensor:
        """`batched_experts` on the backend that `variant` means in the batched format."""
        with debug_checks():
            return batched_experts(
                case.hidden_states,
                case.w13,
                case.w2,
                case.expert_num_tokens,
                activation=case.activation,
                backend=variant,
                out=out,
            )

    def trace(self) -> AbstractContextManager[PathRecord]:
        """`record_path`."""
        return record_path()

    def oracle(self) -> MoegateOracle:
        """`select_backend`, asked in the suite's words."""
        return MoegateOracle()

    def configs(self) -> MoegateConfigs:
        """`find_kernel_configs`, asked in the suite's words."""
        return MoegateConfigs()

    def api(self) -> dict[str, Any]:
        """The public functions."""
        return {
            "fused_experts": fused_experts,
            "batched_experts": batched_experts,
            "select_experts": select_experts,
            "moe_align_block_size": moe_align_block_size,
            "debug_checks": debug_checks,
        }
