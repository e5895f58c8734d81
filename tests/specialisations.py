"""How many kernel variants the gate compiles on one H200, counted on a CPU: `python tests/specialisations.py`.

The suite runs as on a GPU, with its pools and its draws, but operands lie on the CPU, Triton's launcher notes what it
would compile, and nothing is computed or judged. Counted are distinct kernels with their constants, options and what
Triton specialises arguments on. Streams and CUDA graphs are stand-ins that do at once what they are given. What ends a
case before its end is counted and printed, and is a failure of this tool.

Options: `--list FILE` writes every variant, with the tests that asked for it; all else goes to pytest.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import pkgutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

import moegate.conformance as suite
from moegate.conformance import arena, cases, coverage, session, stored
from moegate.conformance.budget import Budget
from moegate.conformance.judge import Ledger
from moegate.conformance.operands import ExpertsOperands
from moegate.conformance.statistics import Statistics
from moegate.impl import layer, path
from moegate.impl.parallel import all_to_all, wire
from moegate.impl.platform import Platform
from moegate.reference.experts import Trace, to_local_ids

HOPPER = replace(Platform.parse("cuda:9.0"), name="NVIDIA H200")
# Operands beyond so many elements are left as they are: nothing but their sizes matters.
FEW = 1 << 11


class ImaginedGpu(str):
    """Tensors are made on the CPU, and whoever asks finds `cuda`."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other == "cuda" if type(other) is str else self is other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = functools.partialmethod(lambda self: hash("cuda"))  # type: ignore[assignment]


class Variants:
    """What would be compiled, and for which tests, in their order."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}
        self.test = ""
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[Any, Callable[..., Any]] = {}

    def launch(self, kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        """In place of `path.launch`."""
        del grid
        record = path._listener.get()
        if record is not None:
            record.launches[kernel.__name__] += 1
        if kernel not in self._binders:
            self._binders[kernel] = jit.create_function_from_signature(kernel.signature, kernel.params, self._backend)
        _, specialization, _ = self._binders[kernel](*args, **meta, debug=False, instrumentation_mode="")
        options = sorted((name, value) for name, value in meta.items() if name not in kernel.signature.parameters)
        named = zip(kernel.signature.parameters, specialization, strict=True)
        key = f"{kernel.__name__} {dict(named)} {options}"
        tests = self.found.setdefault(key, [self.test])
        if tests[-1] != self.test:
            tests.append(self.test)


_on_host: ContextVar[bool] = ContextVar("on_host", default=False)


def _platform(device: Any) -> Platform:
    del device
    return Platform.parse("cpu") if _on_host.get() else HOPPER


def _noted_and_done(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ranks do around collectives must really happen: once for the note, once in plain torch."""

    @functools.wraps(function)
    def both(*arguments: Any, **options: Any) -> Any:
        function(*arguments, **options)
        token = _on_host.set(True)
        try:
            return function(*arguments, **options)
        finally:
            _on_host.reset(token)

    return both


# Exceptions that ended a case before its end, by what they say and where: what it would have compiled after that is not
# counted, so that none of them is right.
_ended: Counter[str] = Counter()


def _nothing_judged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def judge(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = (str(error).splitlines() or [""])[0][:80]
            _ended[f"{type(error).__name__}: {said} ({Path(last.filename).name}:{last.lineno})"] += 1
            return []

    return judge


class ImaginedStream:
    """A stream, event, graph or capture that does at once what it is given, and whatever else it is asked, nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        del arguments, options

    def __enter__(self) -> None:
        pass

    def __exit__(self, *arguments: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


def _imagined_cuda() -> ExitStack:
    """What the suite takes from `torch.cuda`: work is done where it is enqueued, and a capture is a call."""
    stack = ExitStack()
    for name in ("Stream", "Event", "CUDAGraph", "graph", "stream", "current_stream"):
        stack.enter_context(mock.patch.object(torch.cuda, name, ImaginedStream))
    for name in ("synchronize", "_sleep"):
        stack.enter_context(mock.patch.object(torch.cuda, name, return_value=None))
    stack.enter_context(mock.patch.object(torch.Tensor, "record_stream"))
    stream = ImaginedStream()
    stack.enter_context(mock.patch.object(layer, "auxiliary_stream", return_value=stream))
    stack.enter_context(mock.patch.object(layer, "expect_stream", return_value=stream))
    return stack


def _empty_trace(call: ExpertsOperands) -> Trace:
    (m, top_k), (_, h, i) = call.topk_ids.shape, call.w2.shape
    sizes = {"x": (m, h), "output": (m, h), "output_weights": (m, top_k), "expert_output": (m, top_k, h)}
    made = {f.name: torch.zeros(sizes.get(f.name, (m, top_k, i)), dtype=torch.float64) for f in fields(Trace)}
    return Trace(**made | {"local_ids": to_local_ids(call.topk_ids, call.expert_map)})


def _empty_budget(trace: Trace, *arguments: Any) -> Budget:
    del arguments
    made: dict[str, Any] = {"columns_of_a_scale": trace.hidden.shape[2], "is_quantized": False, "is_summed": False}
    for field in fields(Budget):
        if field.name not in made:
            made[field.name] = torch.ones_like(trace.hidden if field.name.startswith("hidden") else trace.output)
    none = trace.hidden.new_zeros(*trace.hidden.shape[:2], 0, trace.hidden.shape[2])
    few = {"common_of_runs": none, "common": none, "weight_error": torch.zeros_like(trace.output_weights)}
    return Budget(**made | few)


def _no_statistics(output: torch.Tensor, trace: Trace, *arguments: Any) -> Statistics:
    del arguments
    rows, none = torch.zeros(len(output)), torch.zeros(0)
    return Statistics(torch.zeros(trace.output.shape), rows, rows, none)


def _grid(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def on_grid(seed: int, tensor: str, shape: Any, dtype: torch.dtype, *arguments: Any, **options: Any) -> Any:
        if torch.Size(shape).numel() > FEW:
            return torch.zeros(shape, dtype=dtype)
        return make(seed, tensor, shape, dtype, *arguments, **options)

    return on_grid


def _place(place: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(place)
    def placed(self: Any, name: str, values: torch.Tensor, *, row_padding: int = 0, fixed: bool = True) -> torch.Tensor:
        if values.numel() <= FEW or not values.dtype.is_floating_point:
            return place(self, name, values, row_padding=row_padding, fixed=fixed)
        # Kernels are compiled for strides, whatever is there; but scales are looked at, and are positive.
        strides = [1, values.shape[-1] + row_padding]
        for size in reversed(values.shape[1:-1]):
            strides.append(strides[-1] * (size + arena.MATRIX_PADDING * (row_padding > 0)))
        span = values.shape[0] * strides[values.ndim - 1]
        make = torch.ones if name.endswith("scale") else torch.zeros
        return make(span, dtype=values.dtype).as_strided(values.shape, strides[: values.ndim][::-1])

    return placed


def _stored(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def numbers(seed: int, name: str, shape: tuple[int, ...], scheme: Any, device: Any) -> torch.Tensor:
        if torch.Size(shape).numel() <= FEW:
            return make(seed, name, shape, scheme, device)
        halved = (*shape[:-1], shape[-1] // 2)
        return torch.empty(halved if scheme.weight == "int4" else shape, dtype=stored.DTYPES[scheme.weight])

    return numbers


def _replace_everywhere(old: Any, new: Any) -> None:
    """In every module of the suite that has taken the name."""
    for module in [m for name, m in sys.modules.items() if name.startswith("moegate.conformance")]:
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


@contextmanager
def imagined(variants: Variants) -> Iterator[None]:
    """The suite as it is on one H200, without one."""
    apart = (".test_", ".faults", ".subjects", "calibrate", "precompile", "isolated_child", "false_alarms")
    for module in pkgutil.walk_packages(suite.__path__, suite.__name__ + "."):
        if not any(part in module.name for part in apart):
            importlib.import_module(module.name)
    from moegate.conformance import budget, evidence, statistics
    from moegate.conformance.properties import hygiene
    from moegate.reference import batched as reference_of_slabs

    for module in [m for name, m in sys.modules.items() if name.startswith("moegate.conformance.properties.")]:
        for name, value in list(vars(module).items()):
            if name.startswith("judge_") and getattr(value, "__module__", None) == module.__name__:
                _replace_everywhere(value, _nothing_judged(value))
    _replace_everywhere(budget.experts_budget, _empty_budget)
    _replace_everywhere(statistics.statistics, _no_statistics)
    _replace_everywhere(hygiene.poisoned_allocations, nullcontext)
    nothing = evidence.Evidence(0, 0, 0.0, 0.0, 0.0, 0, 0, 0, 0, 0, None)
    _replace_everywhere(evidence.evidence_of, lambda *arguments, **options: nothing)
    _replace_everywhere(reference_of_slabs.batched_experts, lambda x, *arguments, **options: torch.zeros(x.shape))
    stored._numbers = _stored(stored._numbers)
    for module in (cases, stored):
        if hasattr(module, "on_grid"):
            module.on_grid = _grid(module.on_grid)
    arena.Arena.place = _place(arena.Arena.place)
    ExpertsOperands.trace = _empty_trace
    wire.Wire.pack = _noted_and_done(wire.Wire.pack)
    for name in ("plan_travel", "sum_over_ranks"):
        setattr(all_to_all, name, _noted_and_done(getattr(all_to_all, name)))
    # Other values of a spec compile nothing new.
    coverage._repeated = lambda specs, pools: tuple(specs)
    torch.set_num_threads(1)
    session.Session.settle = lambda self, *arguments, **options: None
    Ledger.settle = lambda self, *arguments, **options: None
    make = session.Session.__init__

    def imagine(self: Any, subject: Any, device: str) -> None:
        make(self, subject, ImaginedGpu("cpu"))
        explore = self.explore

        def explored(strategy: Any, judge: Callable[[Any], Any], **options: Any) -> None:
            explore(strategy, _nothing_judged(judge), **options)

        self.explore = explored

    session.Session.__init__ = imagine
    with (
        mock.patch.object(path, "launch", variants.launch),
        mock.patch.object(Platform, "of", side_effect=_platform),
        _imagined_cuda(),
    ):
        yield


class Plugin:
    """Notes which test is at work."""

    def __init__(self, variants: Variants) -> None:
        self.variants = variants

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.variants.test = item.name

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            print(
                f"{len(self.variants.found):5} {report.outcome:8} {report.duration:6.1f} s  {report.nodeid}", flush=True
            )


def main(arguments: list[str]) -> None:
    """Count, and print the variants of each kernel, and those that one test alone brings.

    Raises:
        SystemExit: cases ended before their end.
    """
    written = None
    if "--list" in arguments:
        at = arguments.index("--list")
        written = arguments[at + 1]
        arguments = arguments[:at] + arguments[at + 2 :]
    variants = Variants()
    with imagined(variants):
        named = [argument for argument in arguments if not argument.startswith("-")]
        where = [] if any(".py" in name for name in named) else [str(suite.__path__[0])]
        pytest.main([*arguments, *where, "-q", "-p", "no:cacheprovider", "-n", "0", "--no-header"], [Plugin(variants)])
        if where:  # what is compiled before the suite starts
            variants.test = "precompile"
            with redirect_stdout(io.StringIO()):
                importlib.import_module("moegate.conformance.precompile").main("moegate", 0, 1)
    for title, counted in (
        ("kernel", Counter(key.split()[0] for key in variants.found)),
        ("test that alone asks for it", Counter(tests[0] for tests in variants.found.values() if len(tests) == 1)),
    ):
        print(f"\nby {title}:")
        for name, count in counted.most_common():
            print(f"{count:5}  {name}")
    print(f"\nvariants: {len(variants.found)}")
    if written is not None:
        with open(written, "w") as file:
            json.dump(variants.found, file, indent=0)
    if _ended:
        print("\ntoo few, for these ended cases before their end:")
        for said, count in _ended.most_common():
            print(f"{count:5}  {said}")
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
