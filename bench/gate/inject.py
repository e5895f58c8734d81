"""Known slow-downs for the gate to find: a timed spin inside an existing kernel, calibrated where it runs.

On a GPU the layer's last kernel is compiled once more from its own source with a spin put in: its last program waits
so many SM cycles before it begins, and so the kernel, and the layer, end that much later. On a CPU the pass waits.

How much later is not a straight line: a short spin ends before the kernel's other programs do and slows nothing down,
and the kernel with a spin of no cycles is not the plain one. So each slow-down is measured, corrected, and measured
again; one that is never near its level is not called injected.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...impl import path
from ...impl.kernels import combine
from ..spread import robust_deviation
from ..timer import Captured, Clock, interleave

_PREFIX = """\
@triton.jit
def _spin(cycles):
    if (tl.program_id(0) == tl.num_programs(0) - 1) & (tl.program_id(1) == tl.num_programs(1) - 1):
        start = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
        now = start
        while now - start < cycles:
            now = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


"""
_GUESSED_HZ = 1.9e9
# Of one measurement: the fewest and most rounds at a time, and how long it goes on where passes repeat badly.
_ROUNDS, _MOST_SECONDS = (6, 12), 0.3
_ATTEMPTS = 5
# Of a layer's time: what a measurement of `_MOST_SECONDS` can tell.
_LEAST_TOLERANCE = 0.002


def with_spin(source: str, name: str) -> str:
    """A module's source in which the kernel `name` spins first: `spin_cycles`, a number that is not specialised on.

    Raises:
        ValueError: no such kernel, or one that cannot be told what not to specialise on.
    """
    tree = ast.parse(source)
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        raise ValueError(f"kernel: expected a function {name} in the source, found none")
    node = found[0]
    lines = source.splitlines(keepends=True)
    has_docstring = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
    first = node.body[1 if has_docstring else 0].lineno - 1
    last_argument = max(argument.lineno for argument in node.args.args)
    decorated = node.decorator_list[0].lineno - 1
    head = "".join(lines[decorated : node.lineno - 1])
    if "do_not_specialize=[" not in head:
        raise ValueError(f"kernel: expected do_not_specialize in the decorator of {name}")
    return "".join(
        [
            *lines[:decorated],
            _PREFIX,
            re.sub(r"do_not_specialize=\[", 'do_not_specialize=["spin_cycles", ', head),
            *lines[node.lineno - 1 : last_argument],
            "    spin_cycles,\n",
            *lines[last_argument:first],
            "    _spin(spin_cycles)\n",
            *lines[first:],
        ]
    )


@lru_cache(maxsize=1)
def spinning_combine() -> Any:
    """The kernel of the weighted sum's last step, with a spin."""
    file = Path(str(combine.__file__))
    # A module of the same package, so that what it imports relatively is found. Triton reads its source at once.
    name = f"{combine.__package__}.spinning_combine"
    with tempfile.TemporaryDirectory(prefix="moegate-spin-") as folder:
        copy = Path(folder, "spinning_combine.py")
        copy.write_text(with_spin(file.read_text(), "combine_kernel"))
        spec = importlib.util.spec_from_file_location(name, copy)
        if spec is None or spec.loader is None:
            raise RuntimeError(f"no module could be made of {copy}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return module.combine_kernel


@contextmanager
def _launching(cycles: int) -> Iterator[None]:
    launch = path.launch

    def spun(kernel: Any, grid: Any, *args: Any, **meta: Any) -> Any:
        if kernel is combine.combine_kernel:
            return launch(spinning_combine(), grid, *args, spin_cycles=cycles, **meta)
        return launch(kernel, grid, *args, **meta)

    path.launch = spun
    try:
        yield
    finally:
        path.launch = launch


def tolerance(level: float) -> float:
    """How far from its level a slow-down may be and still be called injected: a tenth of it, or 0.2 % of the layer."""
    return max(level / 10, _LEAST_TOLERANCE)


@dataclass(frozen=True)
class Injected:
    """What became of a level.

    Attributes:
        captured: the slowed pass; None where none came within `tolerance` of the level.
        reached: by how much the last pass that was made is slower than the plain one, as a fraction.
        asked: the share of the plain pass that it was made to wait, at the SM clock that was guessed.
    """

    captured: Captured | None
    reached: float
    asked: float


class Injection:
    """Slow-downs of one workload's pass. Nothing else may use the device meanwhile.

    Args:
        capture: makes a pass of the workload's calls as they now are.
        clock: what times passes.
        device: where.
    """

    def __init__(self, capture: Callable[[], Captured], clock: Clock, device: torch.device) -> None:
        self._capture, self._clock, self._device = capture, clock, device

    def at(
        self, levels: Sequence[float], plain: Captured, asked: Mapping[float, float] | None = None
    ) -> dict[float, Injected]:
        """A pass for each level that is slower than the plain one by that, and by how much it really is.

        Args:
            levels: slow-downs as fractions: 0.03 is 3 %.
            plain: the pass to slow down.
            asked: where to begin, by level (`Injected.asked` of another process); at the level itself if left out.
        """
        seconds = statistics.median(interleave({"": plain.run}, self._clock, rounds=3)[""])
        asks = {level: (asked or {}).get(level, level) for level in levels}
        made = {level: self._slowed(plain, seconds, asks[level]) for level in levels}
        ratios: dict[float, list[float]] = {level: [] for level in levels}
        reached: dict[float, float] = {}
        left = list(levels)
        for attempt in range(_ATTEMPTS):
            self._compare(plain, seconds, {level: made[level] for level in left}, ratios)
            reached = {level: statistics.median(ratios[level]) - 1 for level in levels}
            gain = _gain([(asks[level], reached[level]) for level in levels])
            off = [level for level in levels if abs(reached[level] - level) > tolerance(level)]
            left = []
            for level in off if attempt + 1 < _ATTEMPTS else []:
                if abs(reached[level] - level) <= 2 * error_of_median(ratios[level]):
                    left.append(level)  # it may be right: more passes will say
                    continue
                wanted = max(0.0, asks[level] + (level - reached[level]) / gain)
                if wanted != asks[level]:  # else it is too slow with no spin at all
                    asks[level], ratios[level] = wanted, []
                    made[level] = self._slowed(plain, seconds, wanted)
                    left.append(level)
            if not left:
                break
        return {
            level: Injected(
                made[level] if abs(reached[level] - level) <= tolerance(level) else None, reached[level], asks[level]
            )
            for level in levels
        }

    def _slowed(self, plain: Captured, seconds: float, share: float) -> Captured:
        """A pass that waits for about this share of the plain one's seconds."""
        if self._device.type != "cuda":
            return _waiting(plain, share * seconds)
        calls = max(1, len(plain.outputs))
        with _launching(round(share * seconds / calls * _GUESSED_HZ)):
            return self._capture()

    def _compare(
        self, plain: Captured, seconds: float, others: Mapping[float, Captured], ratios: Mapping[float, list[float]]
    ) -> None:
        """Add to `ratios` how long each takes over the plain pass.

        They take turns pass by pass, in random order and without a pause, so that they meet the same SM clocks. It goes
        on until each is known to a third of its tolerance, or `_MOST_SECONDS` are over.
        """
        passes = {"": plain.run} | {str(level): captured.run for level, captured in others.items()}
        least, most = _ROUNDS
        rounds = max(least, min(most, int(_MOST_SECONDS / (len(passes) * seconds) / 4)))
        spent, seed = 0.0, 0
        while spent < _MOST_SECONDS:
            samples = interleave(passes, self._clock, rounds=rounds, seed=seed)
            for level in others:
                ratios[level] += [slow / fast for slow, fast in zip(samples[str(level)], samples[""], strict=True)]
            spent, seed = spent + sum(map(sum, samples.values())), seed + 1
            if all(error_of_median(ratios[level]) <= tolerance(level) / 3 for level in others):
                break


def error_of_median(values: Sequence[float]) -> float:
    """The standard error of a median."""
    return 1.2533 * robust_deviation(values) / len(values) ** 0.5


def _gain(points: Sequence[tuple[float, float]]) -> float:
    """How much slower a pass becomes for what is asked more: the median slope between points, where that can be.

    The SM clock may be another than was guessed, though not by more than twice. What lies beyond is noise, or spins so
    short that nothing waits for them.
    """
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[:i] if a[0] != b[0]]
    return min(2.0, max(0.5, statistics.median(slopes))) if slopes else 1.0


def _waiting(plain: Captured, wait: float) -> Captured:
    def run() -> Any:
        outputs = plain.run()
        ends = time.perf_counter() + wait
        while time.perf_counter() < ends:
            pass
        return outputs

    return Captured(run, plain.outputs, plain.method)
