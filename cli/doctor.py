"""`moegate doctor`: what this machine can run, and what is missing for the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from moegate import __version__, exit_codes
from moegate.conformance.console import printable, wide_console
from moegate.json_output import expect_json_file, put_json

# Distribution, what it is for, and whether the suite cannot run without it.
PACKAGES = (
    ("torch", "everything", True),
    ("triton", "the kernels", True),
    ("numpy", "Triton's interpreter", True),
    ("scipy", "calibration and the speed gate", True),
    ("hypothesis", "the suite", True),
    ("pytest", "the suite", True),
    ("pytest-benchmark", "benchmarks", True),
    ("pytest-xdist", "several workers", True),
    ("ruptures", "change points of the history", False),
    ("jinja2", "the report", False),
    ("plotly", "the report", False),
    ("flashinfer-python", "the flashinfer_cutlass backend (pip install 'moegate[flashinfer]')", False),
    ("transformers", "its MoE blocks as subjects", False),
    ("vllm", "its kernels as a subject", False),
    ("sglang", "its kernels as a subject", False),
)


@dataclass(frozen=True)
class Line:
    """One thing that was looked for.

    Attributes:
        name: what.
        state: `ok`, `missing` (optional) or `broken` (needed).
        detail: version, or what its absence costs.
    """

    name: str
    state: str
    detail: str


def doctor(
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write the result as JSON; - is standard output.")
    ] = None,
) -> None:
    """Say what this machine can run (GPU, interpreter, compilers, packages) and what is missing.

    Exit codes: 0 the suite runs here, 3 it cannot.
    """
    console = wide_console(stderr=json_file == "-")
    expect_json_file(console, "doctor", json_file)
    lines = [
        Line("moegate", "ok", __version__),
        Line("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        *_packages(),
    ]
    lines += [*_devices(), *_modes(), *_compilers()] if importlib.util.find_spec("torch") else []
    is_written = put_json(console, "doctor", json_file, {"schema": 1, "lines": [asdict(line) for line in lines]})
    if json_file != "-":
        table = Table(box=None, pad_edge=False, show_header=False)
        for line in lines:
            style = {"ok": "green", "missing": "yellow", "broken": "red"}[line.state]
            table.add_row(line.name, Text(line.state, style=style), Text(printable(line.detail)))
        console.print(table)
    broken = any(line.state == "broken" for line in lines) or not is_written
    raise typer.Exit(exit_codes.NOTHING_DONE if broken else exit_codes.HOLDS)


def _packages() -> list[Line]:
    lines = []
    for name, purpose, needed in PACKAGES:
        try:
            lines.append(Line(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line(name, "broken" if needed else "missing", f"for {purpose}"))
    return lines


def _devices() -> list[Line]:
    import torch

    if not torch.cuda.is_available():
        return [
            Line("gpu", "missing", "none that torch sees: Triton kernels run under its interpreter, on small shapes")
        ]
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            Line(
                f"gpu {index}",
                "ok",
                f"{properties.name}, capability {properties.major}.{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs, "
                f"L2 {properties.L2_cache_size / 2**20:.0f} MiB",
            )
        )
    return lines


def _modes() -> list[Line]:
    import triton

    from moegate.conformance.interpreter import SUPPORTED

    supported = triton.__version__.startswith(tuple(f"{release}." for release in SUPPORTED))
    releases = ", ".join(f"{release}.x" for release in SUPPORTED)
    detail = "repaired while the suite runs on the CPU" if supported else f"can be repaired only in Triton {releases}"
    lines = [Line("triton interpreter", "ok" if supported else "missing", detail)]
    if os.environ.get("TRITON_INTERPRET"):
        lines.append(Line("TRITON_INTERPRET", "ok", f"set to {os.environ['TRITON_INTERPRET']!r} in this shell"))
    return lines


def _compilers() -> list[Line]:
    lines = []
    for name, purpose in (("cc", "Triton's launchers on a GPU"), ("nvcc", "FlashInfer's kernels on first use")):
        found = shutil.which(name)
        lines.append(Line(name, "ok" if found else "missing", found or f"for {purpose}"))
    return lines
