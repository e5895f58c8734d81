"""A whole MoE layer of one rank: gate, routing, routed experts, shared experts, and their sum."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import path
from .checks import FLOATS, expect_instance, expect_int, expect_tensor, shown
from .experts_module import RoutedExperts
from .fused_moe import what_decides
from .fused_shared import append_shared_experts
from .lora.table import AdapterTable
from .overlap import auxiliary_stream, beside, expect_stream
from .parallel.experts import ParallelExperts
from .plain_module import runs_as_written
from .platform import Platform
from .replay import replayed
from .routing import RoutingFunction, expect_method, select_experts
from .shared_experts import SharedExpertsOrder, SharedExpertsSetting, order_of_call

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""The sum of a tensor over the ranks that share the layer, in place or not."""


@dataclass(frozen=True)
class RoutingMethod:
    """How a layer routes; the fields are `select_experts`' arguments."""

    top_k: int
    scoring_func: str = "softmax"
    renormalize: bool = True
    num_expert_group: int | None = None
    topk_group: int | None = None
    group_ranking: str | None = None
    routed_scaling_factor: float = 1.0
    custom_routing_function: RoutingFunction | None = None


class Gate(nn.Module):
    """The router's linear map.

    Args:
        weight: `[E, H]`, in the dtype in which the logits are computed: float32 logits rank ties apart that bfloat16
            ones make.
        bias: `[E]` of the same dtype, or None (gpt-oss).
        e_score_correction_bias: `[E]`, which ranks and never weighs (DeepSeek-V3), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    e_score_correction_bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        e_score_correction_bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        expect_tensor("gate.weight", weight, shape=("E", "H"), dtypes=FLOATS)
        num_experts = weight.shape[0]
        if bias is not None:
            expect_tensor("gate.bias", bias, shape=(num_experts,), dtypes=(weight.dtype,), like=weight)
        if e_score_correction_bias is not None:
            name = "e_score_correction_bias"
            expect_tensor(name, e_score_correction_bias, shape=(num_experts,), dtypes=FLOATS, like=weight)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("e_score_correction_bias", e_score_correction_bias)

    def parameters_read(self) -> tuple[torch.Tensor | None, ...]:
        """What a call reads beside its argument."""
        own = self._buffers
        return own["weight"], own["bias"], own["e_score_correction_bias"]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[M, H]` to logits `[M, E]`.

        Raises:
            TypeError, ValueError: hidden states of another shape, dtype or device.
        """
        shape = ("M", self.weight.shape[1])
        expect_tensor("hidden_states", hidden_states, shape=shape, dtypes=FLOATS, like=self.weight)
        return path.operate(_logits, hidden_states, self.weight, self.bias)


def _logits(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(hidden_states.to(weight.dtype), weight, bias)


_layers: weakref.WeakValueDictionary[int, MoELayer] = weakref.WeakValueDictionary()
_handles = itertools.count()


class MoELayer(nn.Module):
    """`out = routed(x) + shared(x)`, for tokens that are on this rank, with the experts that this rank holds.

    The sum over ranks is the caller's `reduce`. It is taken once, of routed and shared output together; of the routed
    alone where external shared experts come reduced (`setting.uses_external_experts`).

    Shared experts run when `shared_experts_order` says, which the record of the path holds as
    `shared_experts_order`. Everything that is enqueued can be captured in a CUDA graph, after one call that was not
    (`prepare`). `torch.compile` takes the layer as one operator, without a graph break.

    Args:
        gate: of E experts.
        experts: those of this rank.
        routing: how experts are chosen.
        shared_experts: any module from `[M, H]` to `[M, H]` of the same dtype; None without.
        setting: what surrounds the shared experts; None: nothing does.
        num_fused_shared_experts: of the experts, how many of the last are shared ones (`fuse_shared_experts`), which
            every token gets with the weight 1.
        expert_map: `[E]` int32, global to local id, -1 on another rank; None where all are here.
        aux_stream: of the experts' device; None takes the device's own, where it has one.
        max_captured_tokens: the most tokens that a CUDA graph may be captured with; None: any.
        reduce: the sum over ranks; None: there is one rank, or `parallel` says how they share the layer.
        adapters: LoRA adapters of the routed experts, whose slots tokens name in `lora_ids`; None without. With
            `parallel` those of this rank's experts (`ExpertPlacement.local_experts`) and columns of I
            (`shard_of_adapter`), in the same slots on every rank; or a table that is fully sharded over
            `parallel.ranks.shards`, beside which shared experts are not overlapped.
        parallel: how ranks exchange tokens, and who holds which experts. Its ranks all make the layer, and all call it,
            also without tokens.

    Raises:
        TypeError, ValueError: parts that do not go together, by name.
    """

    expert_map: torch.Tensor | None

    def __init__(
        self,
        gate: Gate,
        experts: RoutedExperts,
        routing: RoutingMethod,
        *,
        shared_experts: nn.Module | None = None,
        setting: SharedExpertsSetting | None = None,
        num_fused_shared_experts: int = 0,
        expert_map: torch.Tensor | None = None,
        aux_stream: torch.cuda.Stream | None = None,
        max_captured_tokens: int | None = None,
        reduce: Reduce | None = None,
        adapters: AdapterTable | None = None,
        parallel: ParallelExperts | None = None,
    ) -> None:
        super().__init__()
        with nullcontext() if not isinstance(parallel, ParallelExperts) else parallel.agreeing():
            for name, part, kind, optional in (
                ("gate", gate, Gate, False),
                ("experts", experts, RoutedExperts, False),
                ("routing", routing, RoutingMethod, False),
                ("shared_experts", shared_experts, nn.Module, True),
                ("setting", setting, SharedExpertsSetting, True),
                ("adapters", adapters, AdapterTable, True),
                ("parallel", parallel, ParallelExperts, True),
            ):
                expect_instance(name, part, kind, optional=optional)
            if reduce is not None and not callable(reduce):
                raise TypeError(f"reduce: expected a callable or None, got {type(reduce).__name__}")
            num_experts, hidden_size = gate.weight.shape
            like = experts.w2
            expect_tensor("gate.weight", gate.weight, shape=("E", experts.hidden_size), dtypes=FLOATS, like=like)
            expect_int("num_fused_shared_experts", num_fused_shared_experts, low=0)
            expect_method(num_experts, gate.e_score_correction_bias, **vars(routing))
            if expert_map is not None:
                if num_fused_shared_experts:
                    raise ValueError(
                        f"num_fused_shared_experts: expected 0 with an expert_map, got {num_fused_shared_experts}: "
                        "every rank would add the whole of them"
                    )
                expect_tensor("expert_map", expert_map, shape=(num_experts,), dtypes=(torch.int32,), like=like)
            elif parallel is None and experts.num_local_experts != num_experts + num_fused_shared_experts:
                raise ValueError(
                    f"experts: expected the gate's {num_experts} and {num_fused_shared_experts} fused shared ones "
                    f"without an expert_map, got {experts.num_local_experts}"
                )
            setting = (
                SharedExpertsSetting(has_shared_experts=shared_experts is not None) if setting is None else setting
            )
            if setting.has_shared_experts != (shared_experts is not None):
                raise ValueError(
                    f"setting: expected has_shared_experts {shared_experts is not None} as shared_experts is "
                    f"{type(shared_experts).__name__}, got {setting.has_shared_experts}"
                )
            if setting.dispatch_runs_shared_experts and (parallel is None or not parallel.overlap):
                raise ValueError(
                    "setting: expected dispatch_runs_shared_experts False, got True: nothing dispatches here, or not so"
                )
            if parallel is not None:
                for name, is_given in (
                    ("reduce", reduce is not None),
                    ("expert_map", expert_map is not None),
                    ("num_fused_shared_experts", num_fused_shared_experts > 0),
                ):
                    if is_given:
                        raise ValueError(f"{name}: expected none beside parallel, which says who adds what, got one")
            if max_captured_tokens is not None:
                expect_int("max_captured_tokens", max_captured_tokens, low=1)
            if aux_stream is not None:
                expect_stream("aux_stream", aux_stream, like.device)
        if parallel is not None:
            if parallel.overlap and shared_experts is not None:
                setting = replace(setting, dispatch_runs_shared_experts=True)
            if adapters is not None and adapters.shards is not None:
                setting = replace(setting, fully_sharded_lora=True)
            parallel.join(experts, num_experts, routing.top_k, adapters)
        elif adapters is not None:
            if adapters.shards is not None:
                raise ValueError(
                    f"adapters: expected a table of whole matrices without parallel, got one that is fully sharded "
                    f"over {adapters.shards.size} ranks"
                )
            rows = like.new_empty((0, hidden_size), dtype=experts.dtype)
            adapters.expect_layer(experts.num_local_experts, rows, experts.intermediate_size, experts.function)
        self.gate = gate
        self.experts = experts
        self.routing = routing
        self.shared_experts: Any = shared_experts
        self.setting = setting
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.num_fused_shared_experts = num_fused_shared_experts
        self.max_captured_tokens = max_captured_tokens
        self.reduce = reduce
        self.adapters = adapters
        self.parallel = parallel
        # What loading it changed, in words for the user.
        self.loading_notes: tuple[str, ...] = ()
        self._aux_stream = aux_stream
        self.register_buffer("expert_map", expert_map)
        self._enroll()

    def _enroll(self) -> None:
        """Take the number by which the operator finds this layer."""
        self._handle = next(_handles)
        _layers[self._handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enroll()  # a copy is a layer of its own

    def forward(
        self, hidden_states: torch.Tensor, lora_ids: torch.Tensor | None = None, padded_tokens: int | None = None
    ) -> torch.Tensor:
        """The layer's output.

        Args:
            hidden_states: `[..., H]` in the experts' dtype, with any leading dimensions.
            lora_ids: `[...]` int32, the slot of each token's adapter, -1 for none; None where no token has one.
            padded_tokens: of a layer that ranks share, the rows that each of them has with its padding, at least M and
                the same on all; None: the most that were agreed.

        Returns:
            As `hidden_states`, in memory of its own.

        Raises:
            TypeError, ValueError: hidden states of another shape, dtype or device; a shared-experts module whose result
                is not `[M, H]` of their dtype and device; a CUDA graph captured with more tokens than declared.
        """
        if not isinstance(hidden_states, torch.Tensor) or hidden_states.dim() < 1:
            raise TypeError(f"hidden_states: expected a tensor [..., {self.hidden_size}], got {shown(hidden_states)}")
        if lora_ids is not None:
            expect_instance("lora_ids", lora_ids, torch.Tensor)
        if padded_tokens is not None:
            expect_int("padded_tokens", padded_tokens, low=0)
        shape = hidden_states.shape
        rows = hidden_states.reshape(-1, shape[-1]) if hidden_states.dim() != 2 else hidden_states
        if lora_ids is not None:
            lora_ids = lora_ids.reshape(-1)
        if torch.compiler.is_compiling():
            # The parameters stand among the arguments so that the compiler knows what is read.
            parameters = [*self.parameters(), *self.buffers()]
            return moe_layer_op(rows, parameters, self._handle, lora_ids, padded_tokens).view(shape)
        result = self._run(rows, lora_ids, padded_tokens)
        return result if rows is hidden_states else result.view(shape)

    def prepare(self, num_tokens: Sequence[int] = (1,)) -> MoELayer:
        """Run the layer once for each M, so that kernels are compiled and weights laid out before a graph is captured.

        Returns:
            The layer.

        Raises:
            TypeError, ValueError: numbers of tokens that are none, before anything runs.
        """
        expect_instance("num_tokens", num_tokens, Sequence)
        for count in num_tokens:
            expect_int("num_tokens", count, low=0)
        for count in num_tokens:
            like = self.experts.w2
            hidden_states = torch.zeros((count, self.hidden_size), dtype=self.experts.dtype, device=like.device)
            self(hidden_states)
            if self.adapters is not None:
                self(hidden_states, torch.full((count,), -1, dtype=torch.int32, device=like.device))
        return self

    def _run(
        self, hidden_states: torch.Tensor, lora_ids: torch.Tensor | None = None, padded_tokens: int | None = None
    ) -> torch.Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._run(hidden_states, lora_ids, padded_tokens)
        if self.shared_experts is None and self.parallel is None and not path.is_recording():
            # There is no order to decide on, and nobody who would hear of it.
            self._expect_captured(hidden_states)
            self._expect_arguments(lora_ids, padded_tokens)
            return self._reduced(self._routed(hidden_states, lora_ids))
        self._expect_rows(hidden_states)
        num_tokens = hidden_states.shape[0]
        self._expect_captured(hidden_states)
        stream = self._stream(hidden_states.device) if self.shared_experts is not None else None
        decision = order_of_call(self.setting, Platform.of(hidden_states.device), stream is not None, num_tokens)
        path.note("shared_experts_order", str(decision.order))
        if path.is_recording():
            path.note("shared_experts_reasons", tuple(reason.as_dict() for reason in decision.reasons))
        if self.parallel is not None:
            return self.parallel.run(
                hidden_states,
                self.experts,
                self._select,
                None if self.shared_experts is None else self._shared,
                order=decision.order,
                stream=stream,
                shared_is_reduced=self.setting.uses_external_experts,
                padded_tokens=padded_tokens,
                adapters=self.adapters,
                lora_ids=lora_ids,
            )
        self._expect_arguments(lora_ids, padded_tokens)
        match decision.order:
            case SharedExpertsOrder.NONE:
                return self._reduced(self._routed(hidden_states, lora_ids))
            case SharedExpertsOrder.MULTI_STREAM_OVERLAPPED if stream is not None:
                with beside(lambda: self._shared(hidden_states), stream, hidden_states) as side:
                    routed = self._routed(hidden_states, lora_ids)
                shared = side.joined()
            case SharedExpertsOrder.EXTERNAL:
                shared = self._shared(hidden_states)
                routed = self._routed(hidden_states, lora_ids)
            case _:
                routed = self._routed(hidden_states, lora_ids)
                shared = self._shared(hidden_states)
        if self.setting.uses_external_experts:
            return self._reduced(routed) + shared
        # The routed output is this call's own: the input and the shared output stay as they are.
        return self._reduced(routed.add_(shared))

    def _expect_rows(self, hidden_states: torch.Tensor) -> None:
        shape, experts = ("M", self.hidden_size), self.experts
        expect_tensor("hidden_states", hidden_states, shape=shape, dtypes=(experts.dtype,), like=experts.w2)

    def _expect_arguments(self, lora_ids: torch.Tensor | None, padded_tokens: int | None) -> None:
        if padded_tokens is not None:
            raise ValueError(f"padded_tokens: expected None for a layer of one rank, got {padded_tokens}")
        if lora_ids is not None and self.adapters is None:
            raise ValueError("lora_ids: expected None without adapters, got ids")

    def _select(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Routing weights and ids, `[M, top_k]` each."""
        return select_experts(
            self.gate(hidden_states),
            **vars(self.routing),
            e_score_correction_bias=self.gate.e_score_correction_bias,
            hidden_states=hidden_states,
        )

    def _routed(self, hidden_states: torch.Tensor, lora_ids: torch.Tensor | None) -> torch.Tensor:
        """The routed experts' output; a call that is all launches is replayed whole, and not in two halves."""
        gate, experts = self.gate, self.experts
        is_ours = runs_as_written(gate, Gate) and runs_as_written(experts, RoutedExperts)
        if not is_ours or self.adapters is not None or self.routing.custom_routing_function is not None:
            return self._routed_as_it_stands(hidden_states, lora_ids)
        settings = (
            self.routing,
            self.num_fused_shared_experts,
            experts.function,
            experts.apply_router_weight_on_input,
            experts.backend,
            experts.allow_tf32,
        )
        return replayed(
            lambda: ("MoELayer", settings, what_decides()),
            (hidden_states, *gate.parameters_read(), self.expert_map, *experts.parameters_read()),
            lambda: self._routed_as_it_stands(hidden_states, lora_ids),
            by_default=hidden_states.is_cuda,  # eager, a small batch keeps the device waiting for the host
        )

    def _routed_as_it_stands(self, hidden_states: torch.Tensor, lora_ids: torch.Tensor | None) -> torch.Tensor:
        self._expect_rows(hidden_states)
        topk_weights, topk_ids = self._select(hidden_states)
        num_experts = self.num_experts
        if self.num_fused_shared_experts:
            topk_weights, topk_ids = append_shared_experts(
                topk_weights, topk_ids, num_experts, self.num_fused_shared_experts
            )
            num_experts += self.num_fused_shared_experts
        return self.experts(
            hidden_states, topk_weights, topk_ids, self.expert_map, num_experts, self.adapters, lora_ids
        )

    def _shared(self, hidden_states: torch.Tensor) -> torch.Tensor:
        result = self.shared_experts(hidden_states)
        shape, dtype = tuple(hidden_states.shape), hidden_states.dtype
        return expect_tensor("shared_experts' result", result, shape=shape, dtypes=(dtype,), like=hidden_states)

    def _reduced(self, output: torch.Tensor) -> torch.Tensor:
        return output if self.reduce is None else self.reduce(output)

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if self._aux_stream is not None:
            return expect_stream("aux_stream", self._aux_stream, device)
        return auxiliary_stream(device)

    def _expect_captured(self, hidden_states: torch.Tensor) -> None:
        most, num_tokens = self.max_captured_tokens, hidden_states.shape[0]
        if most is None or num_tokens <= most or not hidden_states.is_cuda:
            return
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"hidden_states: expected at most max_captured_tokens {most} tokens in a CUDA graph's capture, "
                f"got {num_tokens}"
            )


@torch.library.custom_op("moegate::moe_layer", mutates_args=())
def moe_layer_op(
    hidden_states: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    handle: int,
    lora_ids: torch.Tensor | None = None,
    padded_tokens: int | None = None,
) -> torch.Tensor:
    """A layer as one operator: streams and their events are nothing that a compiler should take apart.

    Args:
        hidden_states: `[M, H]`.
        parameters: the layer's own, which the operator reads.
        handle: the layer's number in this process.
        lora_ids: `[M]` int32, or None.
        padded_tokens: of a layer that ranks share.
    """
    del parameters
    layer = _layers.get(handle)
    if layer is None:
        raise ValueError(f"handle: expected a layer that is alive, got {handle}")
    return layer._run(hidden_states, lora_ids, padded_tokens)


@moe_layer_op.register_fake
def _moe_layer_fake(
    hidden_states: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    handle: int,
    lora_ids: torch.Tensor | None = None,
    padded_tokens: int | None = None,
) -> torch.Tensor:
    del parameters, handle, lora_ids, padded_tokens
    return hidden_states.new_empty(hidden_states.shape)
