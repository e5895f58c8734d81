"""What exchanges do with rows and torch does not have: rows of 8-bit floats picked out, and turns among equal ids."""

from __future__ import annotations

import torch


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """8-bit floats as the bytes they are, in the same memory, for operations and backends that do not know them."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 and x.dtype.is_floating_point else x


def take_rows(x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """`x[which]`, a copy, of any dtype.

    Args:
        x: `[n, ...]`.
        which: int64 numbers in [0, n).
    """
    return as_bytes(x)[which].view(x.dtype)


def turns(ids: torch.Tensor) -> torch.Tensor:
    """How many equal ids stand before each one; nothing waits for the device.

    Args:
        ids: `[n]` int64.

    Returns:
        `[n]` int64.
    """
    order = torch.argsort(ids, stable=True)
    ordered = ids[order]
    result = torch.empty_like(ids)
    result[order] = torch.arange(len(ids), device=ids.device) - torch.searchsorted(ordered, ordered)
    return result
