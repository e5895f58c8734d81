"""Tensor descriptors of weights and rows: how Hopper's copy engine (TMA) reads a tile with one instruction.

The first weight's descriptor counts its rows as (row of gate or up, part), whichever way the weight stores them: only
the strides differ. So one tile can hold each gate row beside its up row. Their sums then lie in one thread, and the
activation needs neither shuffles nor weights that were rearranged.
"""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


def weight_tiles(w: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles `[1, rows, columns]` of `w [E, N, K]`; what a tile reads behind an expert's end is 0."""
    e, n, k = w.shape
    return TensorDescriptor(w, [e, n, k], [w.stride(0), w.stride(1), 1], [1, rows, columns])


def gate_up_tiles(
    w13: torch.Tensor, rows: int, columns: int, *, is_gated: bool, interleaved: bool, group: int
) -> TensorDescriptor:
    """Tiles of `w13 [E, parts * I, H]`: `[1, rows / group, parts, group, columns]`, or `[1, 1, rows, columns]`.

    Args:
        w13: the weight.
        rows: of gate, or of up, in a tile.
        columns: of a tile.
        is_gated: there are up rows: 2 parts.
        interleaved: gate and up rows alternate in `w13`; else all gate rows come first.
        group: a tile holds both parts, `group` rows of gate and then as many of up, where it is not 0; else one part,
            which the second coordinate names. It divides `rows` and I.
    """
    e, n, h = w13.shape
    stride = w13.stride(1)
    parts = 2 if is_gated else 1
    size = n // parts
    row_stride, part_stride = (parts * stride, stride) if interleaved else (stride, size * stride)
    if group:
        return TensorDescriptor(
            w13,
            [e, size // group, parts, group, h],
            [w13.stride(0), group * row_stride, part_stride, row_stride, 1],
            [1, rows // group, parts, group, columns],
        )
    return TensorDescriptor(
        w13, [e, parts, size, h], [w13.stride(0), part_stride, row_stride, 1], [1, 1, rows, columns]
    )


def row_tiles(rows: torch.Tensor, count: int, columns: int) -> TensorDescriptor:
    """Tiles `[count, columns]` of the matrix `rows`; what a tile reads behind its end is 0."""
    return TensorDescriptor(rows, list(rows.shape), [rows.stride(0), 1], [count, columns])
