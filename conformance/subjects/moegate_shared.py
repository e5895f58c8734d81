"""moegate's shared experts: the decision on their order in the suite's plain words, and a layer that has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ...impl import layer as layer_module
from ...impl.experts_module import RoutedExperts, SharedExperts
from ...impl.layer import Gate, MoELayer, RoutingMethod
from ...impl.path import record_path
from ...impl.platform import Platform
from ...impl.shared_experts import SWITCH_VARIABLE, THRESHOLD_VARIABLE, SharedExpertsSetting, shared_experts_order
from ..shared_cases import SharedCase
from ..shared_order import OrderAnswer, SharedOrderSpec

# What no decision may depend on: what the device calls itself, and how large it is.
_NUISANCE = (("", 0), ("NVIDIA H100 80GB HBM3", 132), ("Some Device", 78))


@cache
def _platform(name: str, nuisance: int) -> Platform:
    device, num_sms = _NUISANCE[nuisance]
    return replace(Platform.parse(name), name=device, num_sms=num_sms)


@cache
def _setting(*fields: bool | str | None) -> SharedExpertsSetting:
    return SharedExpertsSetting(*fields)


class MoegateSharedOrder:
    """`shared_experts_order`."""

    def ask(self, question: SharedOrderSpec, *, nuisance: int = 0) -> OrderAnswer:
        """The decision in plain words."""
        variables = {THRESHOLD_VARIABLE: question.threshold, SWITCH_VARIABLE: question.switch}
        try:
            decision = shared_experts_order(
                _setting(
                    question.shared,
                    question.eplb,
                    question.all_to_all,
                    question.sharded_lora,
                    question.dispatch,
                    question.external,
                ),
                _platform(question.platform, nuisance),
                has_auxiliary_stream=question.stream,
                num_tokens=question.tokens,
                environment={name: value for name, value in variables.items() if value is not None},
            )
        except ValueError as error:
            return OrderAnswer(refusal=str(error))
        except Exception as error:  # any other error is a finding, not the end of the run
            return OrderAnswer(crash=f"{type(error).__name__}: {error}")
        return OrderAnswer(
            decision.order.value,
            tuple((reason.test.value, reason.taken, reason.causes, reason.why) for reason in decision.reasons),
        )


Hold = Callable[[str], None]


class Held(nn.Module):
    """A module with what the suite does before and after it."""

    def __init__(self, module: nn.Module, hold: Hold, name: str) -> None:
        super().__init__()
        self.module, self.hold, self.name = module, hold, name

    def forward(self, *arguments: Any) -> Tensor:
        """The module's result."""
        self.hold(f"before_{self.name}")
        result = self.module(*arguments)
        self.hold(f"after_{self.name}")
        return result


def shared_layer(case: SharedCase, backend: str, hold: Hold | None, arguments: Callable[[Any], dict]) -> MoELayer:
    """The layer of a case; its routing is given, and `arguments` are those of the experts of one of its parts."""
    dtype, weights, ids = case.hidden_states.dtype, case.routed.topk_weights, case.routed.topk_ids
    experts = RoutedExperts(**arguments(case.routed), dtype=dtype, backend=backend)
    of_shared = arguments(case.shared)
    of_shared = {name: value for name, value in of_shared.items() if not name.endswith("_bias")}
    of_shared["w13"], of_shared["w2"] = of_shared["w13"][0], of_shared["w2"][0]
    shared = SharedExperts(**of_shared, gate=case.gate, dtype=dtype, backend=backend)
    gate = torch.zeros((case.routed.num_experts, case.hidden_states.shape[1]), dtype=dtype, device=weights.device)
    routing = RoutingMethod(
        case.routed.top_k,
        routed_scaling_factor=case.routed_scaling_factor,
        custom_routing_function=lambda **asked: (weights, ids),
    )
    layer = MoELayer(Gate(gate), experts, routing, shared_experts=shared)
    return layer if hold is None else hold_up(layer, hold)


def hold_up(layer: MoELayer, hold: Hold) -> MoELayer:
    """The layer, which calls `hold` with each of its hand-overs."""
    held: Any = Held(layer.experts, hold, "routed")
    held.w2, held.dtype = layer.experts.w2, layer.experts.dtype
    layer.experts, layer.shared_experts = held, Held(layer.shared_experts, hold, "shared")
    return layer


def run_shared(layer: MoELayer, hidden_states: Tensor, *, overlapped: bool) -> Tensor:
    """The layer's output in the order that is asked for, whatever the threshold says.

    Raises:
        ValueError: an overlap where the layer decides against it.
    """
    if not overlapped:
        with mock.patch.object(layer_module, "auxiliary_stream", return_value=None):
            return layer(hidden_states)
    with mock.patch.dict("os.environ", {THRESHOLD_VARIABLE: str(1 << 20), SWITCH_VARIABLE: "0"}), record_path() as path:
        output = layer(hidden_states)
    if path.last("shared_experts_order") != "multi_stream_overlapped":
        raise ValueError(f"overlapped: expected a second stream, got {path.last('shared_experts_order')}")
    return output
