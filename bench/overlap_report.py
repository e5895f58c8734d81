"""The tables of a run that compares two streams with one, and its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from .overlap import LEAST_HIDEABLE, LEAST_RATIO, SCHEMA, OverlapCell, mean_efficiency, thresholds

Failures = Sequence[tuple[str, int, str]]


def overlap_table(cells: Sequence[OverlapCell]) -> Table:
    """A row for each layer and M; times in microseconds of one call."""
    table = Table()
    for name in ("layer", "stored"):
        table.add_column(name, no_wrap=True)
    numbers = ("M", "serial", "overlapped", "serial / overlapped", "routed", "shared", "bytes", "hideable")
    for name in (*numbers, "efficiency", "kernels", "us / boundary", "over kernels"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("cache", no_wrap=True)
    for cell in cells:
        ratio = cell.ratio
        times = [_us(timing.median) for timing in (cell.serial, cell.overlapped)]
        kernels = ("-", "-", "-")
        if cell.kernels is not None and cell.boundary is not None and cell.excess is not None:
            kernels = (f"{cell.kernels.count:g}", f"{cell.boundary * 1e6:.2f}", f"{cell.excess:.1%}")
        table.add_row(
            cell.layer,
            cell.dtype,
            str(cell.num_tokens),
            *times,
            f"{ratio.median:.3f} ±{(ratio.high - ratio.low) / 2:.3f}",
            _us(cell.routed.median),
            _us(cell.shared.median),
            f"{cell.bytes / 1e6:.1f} MB",
            _us(cell.hideable),
            "-" if cell.efficiency is None else f"{cell.efficiency:.2f}",
            *kernels,
            ("cold" if cell.is_cold else "unproven") + ("" if cell.method == "cuda-graph" else f" ({cell.method})"),
        )
    return table


def summary(cells: Sequence[OverlapCell]) -> list[str]:
    """What the cells say together, in lines."""
    mean = mean_efficiency(cells)
    lines = []
    if mean is not None:
        lines.append(f"mean efficiency {mean[0]:.2f} of {mean[1]} cells that could hide {LEAST_HIDEABLE * 1e6:.0f} us")
    worst = min(cells, key=lambda cell: cell.ratio.median)
    lines.append(f"least serial / overlapped: {worst.ratio.median:.3f} ({worst.layer}, M = {worst.num_tokens})")
    found = ", ".join(f"{name} {threshold}" for name, threshold in thresholds(cells).items())
    lines.append(f"largest M up to which nothing is under {LEAST_RATIO:g}: {found}")
    return lines


def as_json(cells: Sequence[OverlapCell], failures: Failures) -> dict[str, Any]:
    """`{schema, cells, failures: [{layer, num_tokens, reason}], mean_efficiency, counted, thresholds}`."""
    mean = mean_efficiency(cells)
    return {
        "schema": SCHEMA,
        "cells": [cell.as_dict() for cell in cells],
        "failures": [dict(zip(("layer", "num_tokens", "reason"), row, strict=True)) for row in failures],
        "mean_efficiency": None if mean is None else mean[0],
        "counted": 0 if mean is None else mean[1],
        "thresholds": dict(thresholds(cells)),
    }


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.2f}"
