"""Measure one workload: plan, verify, capture, interleave, record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from ..impl.path import record_path
from .floor import Ceilings, floor
from .machine import Clocks, describe_machine, l2_bytes, read_clocks
from .operands import ExpertsCall, Operands, WeightBank, make_operands
from .record import Record, VerdictRecord
from .rotation import plan_rotation
from .timer import (
    Capture,
    Captured,
    Clock,
    CudaClock,
    HostClock,
    PairedRatio,
    Timing,
    capture_graph,
    choose_rounds,
    interleave,
    one_after_another,
)
from .verification import Verdict, Verify, WrongKernelError, verify_by_budget, verify_rows
from .workloads import Workload

# A host call is milliseconds long, and its cache holds a good part of a small layer whatever is done.
HOST_CALLS = 4


@dataclass(frozen=True)
class Measurement:
    """What came out for one workload.

    Attributes:
        records: one for each contender that was timed, ours first.
        failures: why each of the others was not, by name.
    """

    records: tuple[Record, ...]
    failures: Mapping[str, str] = field(default_factory=dict)


def measure_workload(
    workload: Workload,
    subjects: Mapping[str, ExpertsCall],
    *,
    device: torch.device | str,
    ceilings: Ceilings,
    verify: Verify = verify_by_budget,
    bank: WeightBank | None = None,
    clock: Clock | None = None,
    capture: Capture | None = None,
    budget: float = 0.6,
    multiple: float = 2.0,
    seed: int = 0,
) -> Measurement:
    """Time every subject on a workload, interleaved, after each was found right.

    Args:
        workload: what to time.
        subjects: contenders by name. The first is ours: if it is wrong or raises, so does this function. A peer that
            is wrong or raises is left out, with the reason. One with a method `judge` is judged by that.
        device: where.
        ceilings: what the floor is computed with.
        verify: judges ours on the first call's operands; peers are judged by `verify_rows`.
        bank: weights to share with the model's other workloads; None: new ones.
        clock: what times a pass; None: the device's own.
        capture: what makes one pass of a rotation's calls; None: a CUDA graph on a GPU.
        budget: seconds of samples, all subjects together; at least ten rounds are run whatever they take.
        multiple: how many L2 sizes must be read between two reads of the same weights.
        seed: of the order of contenders in each round.

    Raises:
        WrongKernelError: ours is wrong, eagerly or as captured.
        ValueError: a workload that cannot be, no subject, or a bank of other weights.
    """
    if workload.unsupported:
        raise ValueError(f"workload: {workload.model.name}: {workload.unsupported}")
    if not subjects:
        raise ValueError("subjects: expected at least one, got none")
    device = torch.device(device)
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    if bank is None:
        bank = WeightBank(workload.model, workload.format, device)
    elif not bank.serves(workload, device):
        raise ValueError(f"bank: expected weights of {workload.model.name} in {workload.dtype}, got another model's")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        on_gpu = device.type == "cuda"
        rotation = plan_rotation(
            workload,
            l2_bytes(device),
            multiple=multiple,
            max_copies=min(16, bank.room_for(workload)),
            min_calls=None if on_gpu else HOST_CALLS,
        )
        operands = [make_operands(workload, bank, call, rotation.copy_of(call)) for call in range(rotation.calls)]
        clock = clock or (CudaClock(device) if on_gpu else HostClock())
        capture = capture or (capture_graph if on_gpu else one_after_another)
        failures: dict[str, str] = {}
        prepared: dict[str, _Prepared] = {}
        for index, (name, experts) in enumerate(subjects.items()):
            try:
                judge = verify if index == 0 else _judge_of(experts)
                prepared[name] = _prepare(name, experts, operands, verify=judge, capture=capture, clock=clock)
            except Exception as error:
                if index == 0:
                    raise
                failures[name] = f"{type(error).__name__}: {error}"
        passes = {name: contender.captured.run for name, contender in prepared.items()}
        rounds = choose_rounds(passes, clock, budget=budget)
        before = read_clocks(device)
        during: list[Clocks] = []
        samples = interleave(
            passes, clock, rounds=rounds, seed=seed, while_running=lambda: during.append(read_clocks(device))
        )
        timings = {name: Timing(tuple(s / rotation.calls for s in values)) for name, values in samples.items()}
        least = floor(workload, ceilings, range(rotation.calls))
        records = tuple(
            Record(
                workload=workload.id,
                model=workload.model.name,
                num_tokens=workload.num_tokens,
                routing=str(workload.routing),
                dtype=workload.stored,
                subject=name,
                timing=timings[name],
                method=contender.captured.method,
                method_note=contender.captured.note,
                floor=least,
                ceilings=ceilings.as_dict(),
                cache_state=_cache_state(workload, rotation.is_cold),
                rotation=rotation,
                machine=describe_machine(device),
                clocks_before=before,
                clocks_after=during[0],
                path=contender.path,
                verdict=contender.verdict,
                versus={other: PairedRatio.of(timings[name], timings[other]) for other in timings if other != name},
            )
            for name, contender in prepared.items()
        )
        return Measurement(records, failures)


@dataclass(frozen=True)
class _Prepared:
    captured: Captured
    path: Mapping[str, object]
    verdict: VerdictRecord


def _prepare(
    name: str, experts: ExpertsCall, operands: Sequence[Operands], *, verify: Verify, capture: Capture, clock: Clock
) -> _Prepared:
    """Verify a contender, and make one pass of all its calls, whose outputs are verified again."""
    verdict = verify(experts, operands[0])
    expect_right(name, "its result", verdict)
    with record_path() as path:
        operands[0].pass_to(experts)
    calls: list[Callable[[], torch.Tensor]] = [partial(each.pass_to, experts) for each in operands]
    captured = capture(calls, operands[0].hidden_states.device)
    if captured.outputs:
        # What is timed are the graph's replays, so their outputs must be right too, and be written by each replay.
        for out in captured.outputs:
            out.fill_(float("nan"))
        captured.run()
        clock.finish()
        for call, (out, each) in enumerate(zip(captured.outputs, operands, strict=True)):
            replayed = _judge_of(experts)(lambda *_, result=out, **__: result, each)
            expect_right(name, f"call {call} of its graph", replayed)
    by = getattr(verify, "__name__", type(verify).__name__)
    return _Prepared(captured, dict(path.as_dict()), VerdictRecord(True, float(verdict.budget_used), by))


def _judge_of(experts: ExpertsCall) -> Verify:
    """A contender's own judge, where it computes more than the layer alone; else that of all rows."""
    return getattr(experts, "judge", verify_rows)


def expect_right(name: str, what: str, verdict: Verdict) -> None:
    """Let nothing wrong be timed.

    Raises:
        WrongKernelError: the verdict does not hold; it names the subject and what of it was judged.
    """
    if not verdict.holds:
        used = f"{verdict.budget_used:.3g}"
        raise WrongKernelError(f"{name} is wrong and is not timed: {what} used {used} of its error budget")


def _cache_state(workload: Workload, is_cold: bool) -> str:
    if workload.cache_state != "cold":
        return workload.cache_state
    return "cold" if is_cold else "unproven"
