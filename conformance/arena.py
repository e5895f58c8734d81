"""Hostile memory: every operand is a view into an arena whose margins and row padding are poison.

Poison is NaN for floats and 0x7f bytes for integers, so an access out of bounds is a deterministic wrong answer and
not a lucky one. The margins are wide enough that a kernel off by a tile still lands inside the arena. Where Triton's
interpreter runs the kernels, any access to a margin is an error, whatever becomes of what was read (`bounds.py`).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bounds import WITHOUT_MARGINS

MATRIX_PADDING = 16
MARGIN_BYTES = 64 * 1024


def poison(dtype: torch.dtype) -> float | int:
    """The value that fills what no kernel may read: NaN, or 0x7f in every byte of an integer."""
    if dtype.is_floating_point:
        return float("nan")
    return int.from_bytes(b"\x7f" * dtype.itemsize, "little")


@dataclass
class Arena:
    """The operands of one case, and what they held when they were made."""

    _held: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    _kept: list[Tensor] = field(default_factory=list)

    def place(self, name: str, values: Tensor, *, row_padding: int = 0, fixed: bool = True) -> Tensor:
        """A copy of `values` inside poisoned memory.

        Args:
            name: of the operand, for `changed`.
            values: of any shape; moved as they are.
            row_padding: poisoned elements behind each row of the last dimension (stride > width); of three dimensions,
                each matrix has rows of poison behind it too, so that no stride follows from the others: as many as keep
                a stride's alignment, which compilers know strides by.
            fixed: whether the operand is an input, which must not change.
        """
        margin = MARGIN_BYTES // values.element_size()
        width = values.shape[-1] + row_padding if values.ndim else 1
        strides = [width]
        for size in reversed(values.shape[1:-1]):
            strides.insert(0, strides[0] * (size + MATRIX_PADDING * (row_padding > 0)))
        used = values.shape[0] * (strides[0] if values.ndim > 1 else 1) if values.numel() and values.ndim else 0
        whole = torch.full((2 * margin + max(used, 1),), poison(values.dtype), dtype=values.dtype, device=values.device)
        view = whole.as_strided(values.shape, [*strides, 1] if values.ndim > 1 else [1] * values.ndim, margin)
        view.copy_(values)
        if whole.device.type == "cpu":
            self._know_margins(whole, margin, used)
        if fixed:
            self._held.append((name, whole, whole.clone()))
        return view

    def _know_margins(self, whole: Tensor, margin: int, used: int) -> None:
        """Say where the margins are, for as long as this arena is there, and the memory with it."""
        storage, size = whole.untyped_storage(), whole.element_size()
        start = storage.data_ptr()
        WITHOUT_MARGINS[start] = (storage.nbytes(), start + margin * size, start + (margin + used) * size)
        self._kept.append(whole)
        weakref.finalize(self, WITHOUT_MARGINS.pop, start, None)

    def changed(self) -> list[str]:
        """The inputs whose arena, margins and padding included, no longer holds the bits that it was given."""
        return [
            name
            for name, whole, before in self._held
            if not torch.equal(whole.view(torch.uint8), before.view(torch.uint8))
        ]
