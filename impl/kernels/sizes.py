"""Integer arithmetic of launches, in plain Python: Triton's own helpers cost microseconds a call on the host."""

from __future__ import annotations


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()
