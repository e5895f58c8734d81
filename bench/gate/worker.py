"""What a side's process does: describe itself, verify workloads, and time blocks of calls when it is its turn.

Run as `python -m moegate.bench.gate.worker REQUESTS ANSWERS SUBJECT DEVICE`, where the first two are file descriptors.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from ...impl import path
from ...impl.path import record_path
from ..machine import describe_machine, l2_bytes
from ..operands import Operands, WeightBank, make_operands
from ..rotation import plan_rotation
from ..runner import HOST_CALLS, expect_right
from ..selection import choose_device
from ..timer import Captured, Clock, CudaClock, HostClock, capture_graph, interleave, one_after_another
from ..verification import verify_rows
from ..workloads import LoraOptions, Routing, Workload, find_model
from .guards import bytes_over_needed, describe, facts_of
from .inject import Injection
from .process import serve
from .sides import MOEGATE
from .sm_clock import SmClock, other_use
from .timed_subject import TimedSubject

# Of the memory that is free: two sides' processes, each with weight copies and graphs.
_COPIES_SHARE = 3
_WARM_UP_SECONDS = 0.02


def workload_from(data: Mapping[str, Any]) -> Workload:
    """The workload that `workload_as_data` wrote."""
    lora = data["lora"]
    return Workload(
        find_model(data["model"]),
        data["num_tokens"],
        Routing.parse(data["routing"]),
        data["dtype"],
        data["cache_state"],
        None if lora is None else LoraOptions(*lora),
    )


def workload_as_data(workload: Workload) -> dict[str, Any]:
    """What names a workload to another process."""
    return {
        "model": workload.model.name,
        "num_tokens": workload.num_tokens,
        "routing": str(workload.routing),
        "dtype": workload.dtype,
        "cache_state": workload.cache_state,
        "lora": None if workload.lora is None else (workload.lora.rank, workload.lora.adapters),
    }


class Worker:
    """One side's process.

    Args:
        subject: what is timed.
        device: "cpu", "cuda" or "cuda:N".
    """

    def __init__(self, subject: str, device: str) -> None:
        self._device_name, self._subject_name = device, subject
        self._bank: WeightBank | None = None
        self._operands: list[Operands] = []
        self._calls: list[Callable[[], torch.Tensor]] = []
        self._captured: dict[str, Captured] = {}
        self._clock: Clock = HostClock()
        self._subject: TimedSubject | None = None
        self._sm_clock: SmClock | None = None

    def hello(self) -> dict[str, Any]:
        """Load the subject and touch the device; says what both are."""
        device = choose_device(self._device_name)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
            self._clock = CudaClock(device)
        self._device = device
        self._sm_clock = SmClock(device)
        self._subject = TimedSubject(self._subject_name)
        return {"machine": asdict(describe_machine(device)), "most_mhz": self._sm_clock.most}

    def busy(self) -> dict[str, Any]:
        """What else uses the device, before anything of ours runs."""
        return {"busy": other_use(choose_device(self._device_name))}

    def own_workloads(self, routings: str) -> dict[str, Any]:
        """The ids of the workloads that this side's own harness would select."""
        from ..selection import select_workloads

        chosen = select_workloads(choose_device(self._device_name), routings=routings)
        return {"ids": [workload.id for workload in chosen]}

    def describe(self, workloads: list[dict[str, Any]], compiled: int) -> dict[str, Any]:
        """What this side's moegate would do on platforms that are not here."""
        if self._subject_name != MOEGATE:
            return {"paths": {}, "decisions": {}, "kernels": {}}
        return describe([workload_from(each) for each in workloads], compiled=compiled)

    def check(self, workload: dict[str, Any]) -> dict[str, Any]:
        """Verify a workload as conformance does, and say what ran; nothing is timed."""
        chosen, subject = workload_from(workload), self._loaded()
        if why := subject.unsupported(chosen, self._device):
            return {"unsupported": why}
        bank = self._weights(chosen)
        plan = self._plan(chosen, bank)
        operands = make_operands(chosen, bank, 0, 0)
        operands.pass_to(subject.experts)  # compiles, and lays weights out
        with record_path() as record, _resources_of_launches() as kernels:
            operands.pass_to(subject.experts)
        verdict = subject.verify(subject.experts, operands)
        record_of = record.as_dict()
        facts = facts_of(record_of)
        if subject.name == MOEGATE:
            facts["bytes"] = round(bytes_over_needed(chosen, record_of), 4)
        return {
            "holds": bool(verdict.holds),
            "budget_used": float(verdict.budget_used),
            "paths": _plain(facts),
            "kernels": kernels,
            **plan,
        }

    def prepare(self, workload: dict[str, Any], calls: int, copies: int) -> dict[str, Any]:
        """Make one pass of a workload's calls, find its replayed output right, and warm up.

        Both sides do so at once, so nothing is timed here but what it took, in seconds by phase.

        Args:
            workload: which.
            calls: of the rotation.
            copies: of the weights, in turn.
        """
        marks = [time.perf_counter()]
        chosen, subject = workload_from(workload), self._loaded()
        self.release()
        bank = self._weights(chosen)
        self._operands = [make_operands(chosen, bank, call, call % copies) for call in range(calls)]
        self._calls = [partial(each.pass_to, subject.experts) for each in self._operands]
        self._clock.finish()
        marks.append(time.perf_counter())
        self._captured = {"": self._capture()}
        marks.append(time.perf_counter())
        self._expect_right(self._operands[0], self._output(self._captured[""]))
        marks.append(time.perf_counter())
        self._warm_up()
        took = [round(end - start, 4) for start, end in pairwise(marks)]
        phases = dict(zip(("operands", "capture", "verify"), took, strict=True))
        return {"method": self._captured[""].method, "took": phases}

    def pace(self) -> dict[str, Any]:
        """Seconds of one pass; the other side waits meanwhile."""
        times = interleave({"": self._captured[""].run}, self._clock, rounds=3)
        return {"seconds": statistics.median(times[""])}

    def inject(self, levels: list[float], asked: dict[str, float]) -> dict[str, Any]:
        """Make slowed passes beside the plain one; the other side waits meanwhile.

        Args:
            levels: slow-downs, each a pass of its own: 0.03 is 3 %.
            asked: by level, what another pair's process answered as such; empty at first.

        Returns:
            `reached`, by level, how much slower a pass became; `injected`, the levels that it may be timed at; `asked`,
            by level, with what a process of the same workload may begin.
        """
        plain = self._captured[""]
        right = self._output(plain).clone()
        begin = {float(level): share for level, share in asked.items()}
        made = Injection(self._capture, self._clock, self._device).at(levels, plain, begin)
        for level, each in made.items():
            if each.captured is None:
                continue
            out = self._output(each.captured)
            if not torch.equal(out, right):  # the same kernels on the same operands, unless their sums have no order
                self._expect_right(self._operands[0], out)
            self._captured[str(level)] = each.captured
        return {
            "reached": {str(level): each.reached for level, each in made.items()},
            "injected": [level for level, each in made.items() if each.captured is not None],
            "asked": {str(level): each.asked for level, each in made.items() if each.captured is not None},
        }

    def block(self, passes: int, level: str = "") -> dict[str, Any]:
        """Time some passes one after the other; the median call's seconds, and the SM clock meanwhile."""
        captured = self._captured[level]
        captured.run()  # the first pass after a pause waits for its launch, and finds the other side's cache
        readings = [self._clock.time(captured.run) for _ in range(passes)]
        mhz = None if self._sm_clock is None else self._sm_clock.read()
        self._clock.finish()
        return {"seconds": statistics.median(read() for read in readings) / len(self._calls), "mhz": mhz}

    def release(self) -> dict[str, Any]:
        """Let go of a workload's graphs and operands; weights stay for the model's next workload."""
        self._captured, self._calls, self._operands = {}, [], []
        return {}

    def _loaded(self) -> TimedSubject:
        if self._subject is None:
            self.hello()
        if self._subject is None:
            raise RuntimeError("no subject was loaded")
        return self._subject

    def _weights(self, workload: Workload) -> WeightBank:
        if self._bank is None or not self._bank.serves(workload, self._device):
            self._bank = None  # the last model's weights go before the next one's are made
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._bank = WeightBank(workload.model, workload.format, self._device)
        return self._bank

    def _plan(self, workload: Workload, bank: WeightBank) -> dict[str, Any]:
        on_gpu = self._device.type == "cuda"
        plan = plan_rotation(
            workload,
            l2_bytes(self._device),
            max_copies=max(1, min(16, bank.room_for(workload) // _COPIES_SHARE)),
            min_calls=None if on_gpu else HOST_CALLS,
        )
        return {"calls": plan.calls, "copies": plan.weight_copies, "cold": plan.is_cold}

    def _capture(self) -> Captured:
        capture = capture_graph if self._device.type == "cuda" else one_after_another
        return capture(self._calls, self._device)

    def _output(self, captured: Captured) -> torch.Tensor:
        """What a pass computes in its first call, with nothing left of an earlier pass."""
        for out in captured.outputs:
            out.fill_(float("nan"))
        outputs = captured.run()
        self._clock.finish()
        return captured.outputs[0] if captured.outputs else outputs[0]

    def _expect_right(self, operands: Operands, out: torch.Tensor) -> None:
        """The kernels were judged in a process of their own; here, that a pass really computes."""
        expect_right(self._subject_name, "its first call", verify_rows(lambda *_, **__: out, operands))

    def _warm_up(self) -> None:
        ends = time.perf_counter() + _WARM_UP_SECONDS
        while time.perf_counter() < ends:
            self._captured[""].run()
            self._clock.finish()


@contextmanager
def _resources_of_launches() -> Any:
    """Registers and spilled bytes of each kernel that is launched in this block, where the driver says them."""
    found: dict[str, dict[str, int]] = {}
    launch = path.launch

    def recorded(kernel: Any, grid: Any, *args: Any, **meta: Any) -> Any:
        compiled = launch(kernel, grid, *args, **meta)
        with suppress(Exception):  # an interpreted kernel has none
            count = sum(name.startswith(kernel.__name__) for name in found) + 1
            found[f"{kernel.__name__} {count}"] = {
                "registers": compiled.n_regs,
                "spilled": compiled.n_spills,
                "warps": compiled.metadata.num_warps,
            }
        return compiled

    path.launch = recorded
    try:
        yield found
    finally:
        path.launch = launch


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def main(arguments: list[str]) -> None:
    """Serve until the requests end."""
    requests, answers, subject, device = arguments
    worker = Worker(subject, device)
    names = ("hello", "busy", "own_workloads", "describe", "check", "prepare", "pace", "inject", "block", "release")
    serve(int(requests), int(answers), {name: getattr(worker, name) for name in names})


if __name__ == "__main__":
    main(sys.argv[1:])
