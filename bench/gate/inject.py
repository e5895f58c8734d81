"""Known slow-downs for the gate to find: a timed spin inside an existing kernel, calibrated where it runs.

On a GPU the layer's last kernel is compiled once more from its own source with a spin put in: its last program waits
so many SM cycles before it begins, and so the kernel, and the layer, end that much later. On a CPU the call waits.
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
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...impl import path
from ...impl.kernels import combine
from ..timer import Captured

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
_ROUNDS, _BLOCK_SECONDS, _MOST_PASSES = 4, 0.003, 200


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


class Injection:
    """Slow-downs of one workload's pass.

    Args:
        capture: makes a pass of the workload's calls as they now are.
        seconds: of some passes of what was captured.
        device: where.
    """

    def __init__(
        self,
        capture: Callable[[], Captured],
        seconds: Callable[[Captured, int], list[float]],
        device: torch.device,
    ) -> None:
        self._capture, self._seconds, self._device = capture, seconds, device

    def at(self, levels: Sequence[float], plain: Captured) -> dict[float, tuple[Captured, float]]:
        """A pass for each level, and by how much it really is slower than the plain one.

        Raises:
            RuntimeError: the pass does not become slower however long the kernel spins.
        """
        if self._device.type != "cuda":
            made = {level: _waiting(plain, level, self._seconds) for level in levels}
        else:
            made = self._spinning(levels, plain)
        reached = self._compare(plain, made)
        return {level: (made[level], reached[level]) for level in levels}

    def _spinning(self, levels: Sequence[float], plain: Captured) -> dict[float, Captured]:
        calls = max(1, len(plain.outputs))
        seconds = statistics.median(self._seconds(plain, 3)) / calls
        most = max(1, int(2 * max(levels) * seconds * _GUESSED_HZ))
        probes: dict[float, Captured] = {0.0: self._spun(0), float(most): self._spun(most)}
        slower = self._compare(plain, probes)
        slope = (slower[float(most)] - slower[0.0]) / most
        if slope <= 0:
            raise RuntimeError(f"a spin of {most} cycles does not slow the layer down")
        return {level: self._spun(max(0, round((level - slower[0.0]) / slope))) for level in levels}

    def _spun(self, cycles: int) -> Captured:
        with _launching(cycles):
            return self._capture()

    def _compare(self, plain: Captured, others: Mapping[float, Captured]) -> dict[float, float]:
        """By how much each is slower than the plain pass, taking turns."""
        one = statistics.median(self._seconds(plain, 3))
        passes = max(1, min(_MOST_PASSES, int(_BLOCK_SECONDS / one)))
        ratios: dict[float, list[float]] = {name: [] for name in others}
        for _ in range(_ROUNDS):
            before = statistics.median(self._seconds(plain, passes))
            for name, captured in others.items():
                ratios[name].append(statistics.median(self._seconds(captured, passes)) / before - 1)
        return {name: statistics.median(values) for name, values in ratios.items()}


def _waiting(plain: Captured, level: float, seconds: Callable[[Captured, int], list[float]]) -> Captured:
    wait = level * statistics.median(seconds(plain, 5))

    def run() -> Any:
        outputs = plain.run()
        ends = time.perf_counter() + wait
        while time.perf_counter() < ends:
            pass
        return outputs

    return Captured(run, plain.outputs, plain.method)
