"""How far two ways of computing one layer may be apart where each is right."""

from __future__ import annotations

import torch


def assert_same_rounding(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal but for the order of float32 sums: of those few values cross a rounding to storage, by one step."""
    error = (found.float() - expected.float()).abs()
    step = torch.finfo(found.dtype).eps
    assert (error <= step * expected.float().abs() + 1e-3).all(), f"{what}: {error.max()}"
    assert (error > 0).float().mean() < 0.02, what


def assert_same_sum(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for ranks' parts: each is rounded to bfloat16, and then their sum is."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6 * largest)
