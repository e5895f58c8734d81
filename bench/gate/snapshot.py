"""What is guarded without a clock and without a base: launches, paths, bytes, registers, spills, in a checked-in file.

A difference that is meant is taken by writing the file anew (`--moegate-guards-accept`), and shows in the review.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton

from ...impl.whole_file import write_whole
from ..selection import LORA, LORA_MODEL
from ..workloads import MODELS, Workload
from .guards import Described, compare, describe
from .record import Change

FILE = Path(__file__).with_name("guarded.json")
SCHEMA = "moegate-guards/1"
PLATFORMS = ("cuda:9.0", "rocm:gfx942")
INTERPRETED = bool(triton.knobs.runtime.interpret)
_TOKENS = (1, 4, 64, 4096)
_COMPILED = 20
_GUARDED = ("backend", "assignment", "launches", "bytes", "refusal")


def current(*, compiled: int = _COMPILED) -> Described:
    """What the checkout does now: every model in bf16, and one in other kinds of format and with adapters.

    A process that interprets kernels compiles none.
    """
    model = MODELS[LORA_MODEL]
    workloads = [Workload(model, count, lora=LORA) for count in _TOKENS]
    workloads += [Workload(each, count) for each in MODELS.values() for count in _TOKENS]
    workloads += [
        Workload(model, count, dtype=dtype) for dtype in ("fp8-block", "int4-g128") for count in (1, 64, 4096)
    ]
    said = describe(workloads, compiled=0 if INTERPRETED else compiled, platforms=PLATFORMS)
    paths = {name: {fact: path[fact] for fact in _GUARDED if fact in path} for name, path in said["paths"].items()}
    return Described(paths=paths, kernels=said["kernels"])


def stored(file: Path = FILE) -> Described:
    """What is guarded; without kernels where another Triton compiled them.

    Raises:
        ValueError: no such file, or another schema.
    """
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected guards, got {error}") from None
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{file}: expected schema {SCHEMA}, got {data.get('schema')!r}")
    return Described(paths=data["paths"], kernels=data["kernels"] if data["triton"] == triton.__version__ else {})


def write(described: Described, file: Path = FILE) -> None:
    """Guard this from now on; a line for each call and kernel, so that a review shows what changed."""
    lines = [f'"schema": {json.dumps(SCHEMA)}', f'"triton": {json.dumps(triton.__version__)}']
    lines += [
        f'"{name}": {{\n{_lines(part)}\n}}'
        for name, part in (("paths", described.paths), ("kernels", described.kernels))
    ]
    write_whole(file, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _lines(part: Mapping[str, Any]) -> str:
    return ",\n".join(f" {json.dumps(name)}: {json.dumps(part[name], sort_keys=True)}" for name in sorted(part))


def differences(before: Described, now: Described) -> list[Change]:
    """What differs, and what is guarded and no longer there."""
    gone = [Change("workload", name, "guarded", "gone", fails=True) for name in before.paths if name not in now.paths]
    return gone + compare(before, now)
