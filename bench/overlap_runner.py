"""Measure what an overlap gains: one layer on one stream and on two, its parts alone, interleaved in one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np
import torch
from rich.console import Console

from ..impl.layer import Gate, MoELayer, RoutingMethod
from ..impl.path import record_path
from ..impl.routing import select_experts
from ..impl.shared_experts import SWITCH_VARIABLE, THRESHOLD_VARIABLE, SharedExpertsOrder
from .kernel_times import kernel_times
from .layers import LayerBank, LayerModel, hidden_states_of
from .machine import describe_machine, l2_bytes
from .operands import Operands
from .overlap import OverlapCell
from .plain import plain_experts
from .rotation import Rotation, calls_to_average, rotation_of
from .session import progress_bar
from .timer import Capture, Captured, Clock, CudaClock, Timing, capture_graph, choose_rounds, interleave
from .verification import WrongKernelError, judge_rows
from .workloads import Workload

GPU_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
_MULTIPLE = 2.0
_MOST_CALLS, _MOST_COPIES = 64, 16


@dataclass(frozen=True)
class _Call:
    """One call of a rotation: a layer, the same without its shared experts, and the input."""

    layer: MoELayer
    routed: MoELayer
    hidden_states: torch.Tensor

    def in_order(self, order: SharedExpertsOrder) -> torch.Tensor:
        """The layer's output in that order, whatever threshold and switch are set.

        Raises:
            RuntimeError: the layer decides on another one.
        """
        overlaps = order is SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
        with (
            _environment({THRESHOLD_VARIABLE: str(1 << 30), SWITCH_VARIABLE: "0" if overlaps else "1"}),
            record_path() as path,
        ):
            output = self.layer(self.hidden_states)
        if path.last("shared_experts_order") != order:
            raise RuntimeError(f"order: expected {order}, got {path.last('shared_experts_order')}")
        return output

    def passes(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        """What is timed, by name."""
        return {
            "serial": partial(self.in_order, SharedExpertsOrder.NO_OVERLAP),
            "overlapped": partial(self.in_order, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED),
            "routed": partial(self.routed, self.hidden_states),
            "shared": partial(self.layer.shared_experts, self.hidden_states),
        }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _route(gate: Gate, routing: RoutingMethod, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return select_experts(gate(hidden_states), **vars(routing), e_score_correction_bias=gate.e_score_correction_bias)


def _plan(
    model: LayerModel, bank: LayerBank, num_tokens: int, device: torch.device
) -> tuple[Rotation, list[np.ndarray], bool]:
    """The rotation, which experts each of its calls touches, and whether routed and shared weights are cold.

    Each call has shared experts of its own: so many that even alone they come from memory.
    """
    last_level = l2_bytes(device)
    calls = calls_to_average(num_tokens)
    if last_level:
        calls = max(calls, ceil(_MULTIPLE * last_level / model.shared_bytes) + 1)
    calls = min(calls, _MOST_CALLS)
    shared_is_cold = calls * model.shared_bytes >= _MULTIPLE * last_level
    touched = []
    for call in range(calls):
        hidden_states = hidden_states_of(model, num_tokens, call, device)
        _, ids = _route(bank.gate(call), model.routing, hidden_states)
        touched.append(np.bincount(ids.cpu().numpy().ravel(), minlength=model.routed.num_experts) > 0)
    w2_bytes = model.expert_bytes // 3
    most = min(_MOST_COPIES, bank.routed.room_for(Workload(model.routed, num_tokens, dtype=model.dtype)))
    plans = []
    for copies in range(1, max(1, most) + 1):
        plan = rotation_of(
            touched,
            copies,
            w13_bytes=model.expert_bytes - w2_bytes,
            w2_bytes=w2_bytes,
            l2_bytes=last_level,
            multiple=_MULTIPLE,
        )
        plans.append(plan)
        if plan.is_cold or not last_level:
            break
    best = max(plans, key=lambda plan: plan.reuse_bytes)
    return best, touched, best.is_cold and shared_is_cold


def measure_overlap(
    model: LayerModel,
    num_tokens: int,
    bank: LayerBank,
    *,
    clock: Clock | None = None,
    capture: Capture = capture_graph,
    budget: float = 0.6,
    seed: int = 0,
) -> OverlapCell:
    """Time one layer at one M on one stream, on two, and its parts alone, after both were found right and equal.

    Args:
        model: the layer.
        num_tokens: M.
        bank: its weights.
        clock: what times a pass; None: the device's events.
        capture: what makes one pass of a rotation's calls.
        budget: seconds of samples, all four together.
        seed: of the order in each round.

    Raises:
        WrongKernelError: the serial layer is wrong, or the overlapped one has other bits.
        RuntimeError: the layer does not overlap here.
    """
    device = bank.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        plan, touched, is_cold = _plan(model, bank, num_tokens, device)
        calls = [
            _Call(
                bank.layer(plan.copy_of(call), call),
                bank.routed_alone(plan.copy_of(call), call),
                hidden_states_of(model, num_tokens, call, device),
            )
            for call in range(plan.calls)
        ]
        by_name = [call.passes() for call in calls]
        clock = clock or CudaClock(device)
        captured = {name: capture([each[name] for each in by_name], device) for name in by_name[0]}
        _expect_right(model, calls, captured, clock)
        passes = {name: each.run for name, each in captured.items()}
        rounds = choose_rounds(passes, clock, budget=budget)
        samples = interleave(passes, clock, rounds=rounds, seed=seed)
        timings = {name: Timing(tuple(s / plan.calls for s in values)) for name, values in samples.items()}
        methods = dict.fromkeys(each.note or each.method for each in captured.values())
        is_graph = list(methods) == ["cuda-graph"]
        distinct = float(np.mean([each.sum() for each in touched]))
        return OverlapCell(
            layer=model.name,
            num_tokens=num_tokens,
            dtype=model.dtype,
            bytes=model.bytes_of_call(num_tokens, distinct),
            calls=plan.calls,
            is_cold=is_cold,
            method="; ".join(methods),
            kernels=kernel_times(passes["serial"], plan.calls, device) if is_graph else None,
            machine=describe_machine(device),
            **timings,
        )


def _expect_right(model: LayerModel, calls: Sequence[_Call], captured: Mapping[str, Captured], clock: Clock) -> None:
    """Let nothing wrong be timed: the serial layer against plain torch, the overlapped one against the serial one."""
    right = _plain_layer(model, calls[0])
    eager = calls[0].passes()
    outputs = {name: [eager[name]()] for name in ("serial", "overlapped")}
    for name in outputs:
        if captured[name].outputs:
            # What is timed are the graph's replays, each of which must write its outputs anew.
            for output in captured[name].outputs:
                output.fill_(float("nan"))
            captured[name].run()
            clock.finish()
            outputs[name] = list(captured[name].outputs)
    serial = outputs["serial"]
    verdict = judge_rows(serial[0], right, model.format.activations, model.format.scheme)
    if not verdict.holds:
        raise WrongKernelError(f"{model.name}: the serial layer used {verdict.budget_used:.3g} of its error budget")
    for call, (a, b) in enumerate(zip(serial, outputs["overlapped"], strict=True)):
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)) or bool(a.isnan().any()):
            raise WrongKernelError(f"{model.name}: call {call} on two streams has other bits than on one")


def _plain_layer(model: LayerModel, call: _Call) -> torch.Tensor:
    """The layer in plain torch, with the routing that the layer itself chose."""
    layer, x = call.layer, call.hidden_states
    weights, ids = _route(layer.gate, layer.routing, x)
    shared = layer.shared_experts
    ones = torch.ones((len(x), 1), dtype=torch.float32, device=x.device)
    if shared.gate is not None:
        ones = torch.sigmoid(x.float() @ shared.gate.float().T)
    zeros = torch.zeros((len(x), 1), dtype=torch.int32, device=x.device)
    total = torch.zeros((), device=x.device)
    for experts, topk_weights, topk_ids, count in (
        (layer.experts, weights, ids, model.routed.num_experts),
        (shared.expert, ones, zeros, 1),
    ):
        operands = Operands(
            hidden_states=x,
            w13=experts.w13,
            w2=experts.w2,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=model.routed.activation,
            expert_map=None,
            global_num_experts=count,
            quant=experts.quant,
        )
        total = total + plain_experts(operands)
    return total


def run_overlap(
    layers: Sequence[LayerModel],
    tokens: Sequence[int],
    device: torch.device,
    *,
    budget: float = 0.6,
    progress_console: Console | None = None,
) -> tuple[list[OverlapCell], list[tuple[str, int, str]]]:
    """Measure every layer at every M, with a progress bar; what fails is kept, and the rest goes on.

    Returns:
        The cells, and (layer, M, reason) of what was not measured.
    """
    cells: list[OverlapCell] = []
    failures: list[tuple[str, int, str]] = []
    with progress_bar(progress_console) as progress:
        task = progress.add_task("timing", total=len(layers) * len(tokens))
        for model in layers:
            bank = LayerBank(model, device)
            for num_tokens in tokens:
                progress.update(task, description=f"{model.name} M={num_tokens}")
                try:
                    cells.append(measure_overlap(model, num_tokens, bank, budget=budget))
                except Exception as error:
                    failures.append((model.name, num_tokens, f"{type(error).__name__}: {error}"))
                progress.advance(task)
            del bank  # before the next layer's weights are made
    return cells, failures
