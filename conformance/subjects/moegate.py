"""moegate's own implementation under its own suite. In `conformance`, `impl` is known to the `moegate*` files alone.

What a facet alone has a use for is imported when it is asked for: most runs, a hunt for a fault above all, ask for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ...impl.align import moe_align_block_size
from ...impl.batched import batched_experts
from ...impl.checks import debug_checks
from ...impl.config import QuantScheme
from ...impl.fused_moe import fused_experts
from ...impl.path import PathRecord, record_path
from ...impl.platform import Platform
from ...impl.quantization import ActivationScale, ExpertsQuantization
from ...impl.quantize import quantize_activations
from ...impl.routing import select_experts
from ..cases import AlignCase, BatchedCase, ExpertsCase, LayerCase, QuantizeCase, RoutingCase
from ..lora_cases import LoraCase
from ..numerics import Numerics
from ..parallel_cases import ParallelCase
from ..properties.ep import RankResult
from ..properties.path import Launches
from ..properties.public import PublicCall
from ..shared_cases import SharedCase
from ..spec import ACTIVATIONS, BIASES, SCHEMES, Scheme
from ..subject import ROUTING_METHODS, Capabilities, Subject

if TYPE_CHECKING:
    from .moegate_configs import MoegateConfigs
    from .moegate_lora import MoegateLoraLayer
    from .moegate_oracle import MoegateOracle
    from .moegate_shared import Hold, MoegateSharedOrder

_QUANT_SCHEMES = {
    ("fp8", True): QuantScheme.FP8_W8A8,
    ("int8", True): QuantScheme.INT8_W8A8,
    ("int8", False): QuantScheme.INT8_W8A16,
    ("int4", False): QuantScheme.INT4_W4A16,
}


def launches_of(case: LayerCase) -> dict[str, tuple[dict[str, int], ...]]:
    """The kernels of each path: what quantises activations depends on what shares their scale."""
    quantiser = {
        "none": {"activation_kernel": 1},
        # The scale of the whole tensor is known only when all of it is: a pass for the scale, one for the values.
        "tensor": {"amax_kernel": 2, "quantize_rows_kernel": 2, "activation_kernel": 1},
    }.get(case.activation_scale, {"quantize_rows_kernel": 1, "quantized_activation_kernel": 1})
    layer = {"grouped_gemm_kernel": 2, "combine_kernel": 1, **quantiser}
    aligned = {"align_place_kernel": 1, **layer}
    # The format's own kernels: GEMMs and activations over slabs.
    own = ("activation_kernel", "quantized_activation_kernel")
    batched = {f"batched_{name}" if name in own else name: count for name, count in quantiser.items()}
    return {
        "naive": (layer,),
        # Past a few thousand pairs the counting is a launch of its own.
        "aligned": (aligned, {"align_count_kernel": 1, **aligned}),
        "batched": ({"batched_gemm_kernel": 2, **batched},),
    }


def quant_scheme(scheme: Scheme) -> QuantScheme:
    """The implementation's name of a scheme's stored formats."""
    return _QUANT_SCHEMES[str(scheme.weight), scheme.activation_scale is not None]


def _layer_arguments(case: LayerCase) -> dict[str, Any]:
    """The arguments of `fused_experts` and `batched_experts` that say what the experts are."""
    stored = case.stored
    quant = None
    if stored is not None:
        quant = ExpertsQuantization(
            scheme=quant_scheme(stored.scheme),
            block_shape=stored.block_shape,
            per_act_token_quant=stored.scheme.activation_scale == "token",
            **stored.tensors(),
        )
    return {
        "w13": case.w13,
        "w2": case.w2,
        "w13_bias": case.w13_bias,
        "w2_bias": case.w2_bias,
        "quant": quant,
        "activation": case.activation.name,
        "swiglu_alpha": case.activation.alpha,
        "swiglu_limit": case.activation.limit,
        "interleaved": case.activation.interleaved,
    }


def routing_arguments(case: RoutingCase, variant: str) -> dict[str, Any]:
    """The arguments of `select_experts`."""
    method = case.method()
    by_default = "max" if case.e_score_correction_bias is None else "top2_sum"
    if case.group_ranking == by_default and len(case.router_logits) % 2:
        del method["group_ranking"]  # what it is where nothing is said
    backend = "triton" if variant == "triton" else "torch"
    return {"router_logits": case.router_logits, "top_k": case.top_k, **method, "backend": backend}


def experts_arguments(case: ExpertsCase, variant: str) -> dict[str, Any]:
    """The arguments of `fused_experts`."""
    return {
        "hidden_states": case.hidden_states,
        "topk_weights": case.topk_weights,
        "topk_ids": case.topk_ids,
        **_layer_arguments(case),
        "apply_router_weight_on_input": case.apply_router_weight_on_input,
        "expert_map": case.expert_map,
        "global_num_experts": case.num_experts,
        "backend": variant,
    }


class MoegateSubject(Subject):
    """`fused_experts`, `select_experts` and `moe_align_block_size`, on each backend of the device."""

    name = "moegate"
    variants = ("triton", "cpu")
    capabilities = Capabilities(
        id_dtypes=("int32", "int64"),
        schemes=tuple(SCHEMES),
        batched_schemes=tuple(name for name, scheme in SCHEMES.items() if scheme.weight in (None, "fp8")),
        activations=tuple(ACTIVATIONS),
        biases=BIASES,
        overlap=True,
        **ROUTING_METHODS,
    )
    numerics = Numerics(accumulator="hopper_fp8", promoted_every=128)
    launches: ClassVar[dict[str, Launches]] = {"triton": launches_of}

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
        """`select_experts`, with the checks that synchronise the device."""
        with debug_checks():
            return select_experts(**routing_arguments(case, variant))

    def align(self, case: AlignCase, variant: str) -> tuple[Tensor, Tensor, Tensor]:
        """`moe_align_block_size`."""
        with debug_checks():
            return moe_align_block_size(case.topk_ids, case.block_size, case.num_experts, case.expert_map)

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """`fused_experts` on the backend named by `variant`, with the checks that synchronise the device."""
        with debug_checks():
            return fused_experts(**experts_arguments(case, variant))

    def batched(self, case: BatchedCase, variant: str, out: Tensor | None) -> Tensor:
        """`batched_experts` on the backend that `variant` means in the batched format."""
        with debug_checks():
            return batched_experts(
                case.hidden_states,
                expert_num_tokens=case.expert_num_tokens,
                **_layer_arguments(case),
                backend=variant,
                out=out,
            )

    def quantize(self, case: QuantizeCase, variant: str) -> tuple[Tensor, Tensor]:
        """`quantize_activations`."""
        scale = case.how.granularity if case.static_scale is None else "static"
        backend = "triton" if variant == "triton" else "torch"
        with debug_checks():
            return quantize_activations(
                case.x,
                case.how.dtype,
                ActivationScale(scale),
                group=case.how.group,
                static_scale=case.static_scale,
                backend=backend,
            )

    def shared(self, case: SharedCase, variant: str, *, overlapped: bool, hold: Hold | None) -> Tensor:
        """`MoELayer` with the routing that is given."""
        from .moegate_shared import run_shared, shared_layer

        layer = shared_layer(case, variant, hold, _layer_arguments)
        return run_shared(layer, case.hidden_states, overlapped=overlapped)

    def capture(self, case: SharedCase, variant: str) -> Callable[[], Tensor]:
        """`MoELayer`, on two streams on a GPU."""
        from .moegate_shared import run_shared, shared_layer

        layer = shared_layer(case, variant, None, _layer_arguments)
        return lambda: run_shared(layer, case.hidden_states, overlapped=case.hidden_states.is_cuda)

    def lora(self, case: LoraCase, num_slots: int, variant: str) -> MoegateLoraLayer:
        """`fused_experts` or `batched_experts` with an `AdapterTable`."""
        from .moegate_lora import MoegateLoraLayer

        return MoegateLoraLayer(case, variant, num_slots, _layer_arguments)

    def parallel(self, case: ParallelCase, links: Any, variant: str, *, fails: tuple[int, str] | None) -> RankResult:
        """`MoELayer` with `ParallelExperts`, and the routing that is given."""
        from .moegate_parallel import run_rank

        return run_rank(case, links, variant, _layer_arguments, fails)

    def trace(self) -> AbstractContextManager[PathRecord]:
        """`record_path`."""
        return record_path()

    def oracle(self) -> MoegateOracle:
        """`select_backend`, asked in the suite's words."""
        from .moegate_oracle import MoegateOracle

        return MoegateOracle()

    def configs(self) -> MoegateConfigs:
        """`find_kernel_configs`, asked in the suite's words."""
        from .moegate_configs import MoegateConfigs

        return MoegateConfigs()

    def shared_order(self) -> MoegateSharedOrder:
        """`shared_experts_order`, asked in the suite's words."""
        from .moegate_shared import MoegateSharedOrder

        return MoegateSharedOrder()

    def public(self) -> Sequence[PublicCall]:
        """All that `moegate.impl` has; its other names stand in `tests/test_bad_input.py`, each with a reason."""
        from .moegate_public_adapters import ADAPTER_CALLS
        from .moegate_public_answers import ANSWER_CALLS
        from .moegate_public_files import FILE_CALLS
        from .moegate_public_layers import LAYER_CALLS
        from .moegate_public_loaded import LOADED_CALLS
        from .moegate_public_ranks import RANK_CALLS
        from .moegate_public_values import VALUE_CALLS
        from .moegate_public_weights import WEIGHT_CALLS
        from .moegate_public_whole import WHOLE_CALLS

        return (
            *(*LAYER_CALLS, *VALUE_CALLS, *FILE_CALLS, *LOADED_CALLS),
            *(*ANSWER_CALLS, *RANK_CALLS, *ADAPTER_CALLS, *WEIGHT_CALLS, *WHOLE_CALLS),
        )

    def api(self) -> dict[str, Any]:
        """The public functions."""
        return {
            "fused_experts": fused_experts,
            "batched_experts": batched_experts,
            "select_experts": select_experts,
            "moe_align_block_size": moe_align_block_size,
            "debug_checks": debug_checks,
            "ExpertsQuantization": ExpertsQuantization,
        }
