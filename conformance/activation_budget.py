"""How errors pass through the activation between an expert's two GEMMs, A(gate) * B(up), and what it adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.activations import Activation
from .numerics import FLOAT32, Format
from .rounding import floor, rounding

# float32 exp, reciprocal and product of a sigmoid: unit roundoffs of the parts, in quadrature; GPUs' approximate exp
# is good to 2 ulp (CUDA C++ Programming Guide, "Intrinsic Functions").
SIGMOID_ROUNDOFFS = 4.0
# 1 + erf and 1 + tanh cancel where the gate is far below zero: what they round is of the gate's size, not of theirs.
CANCELLING = ("gelu", "gelu_tanh", "gelu_no_mul")
# Beyond so many sigma of a clamp's edge an error does not reach over it.
REACH = 6.0


@dataclass(frozen=True)
class Slopes:
    """A and B at the reference's gate and up, and how fast they change there; shapes as gate."""

    a: Tensor
    b: Tensor
    of_gate: Tensor
    of_up: Tensor


def slopes(activation: Activation, gate: Tensor, up: Tensor, gate_variance: Tensor, up_variance: Tensor) -> Slopes:
    """The slopes of A * B; at a clamp's edge the larger one of both sides, where an error may reach over it."""
    a, b = activation.of_gate(gate), activation.of_up(up)
    gate_slope, up_slope = activation.of_gate_slope(gate), activation.of_up_slope(up)
    if activation.name == "swigluoai":
        limit = activation.limit
        inside = activation.of_gate_slope(gate.clamp(max=limit))
        gate_slope = torch.where(gate - limit <= REACH * gate_variance.sqrt(), inside, gate_slope)
        up_slope = torch.where(up.abs() - limit <= REACH * up_variance.sqrt(), 1.0, up_slope)
    return Slopes(a, b, gate_slope * b, a * up_slope)


def saturated(activation: Activation, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """Masks of elements that a clamp makes one and the same number, wherever they stand: their errors are one too."""
    if activation.name != "swigluoai":
        return ()
    at_limit = gate >= activation.limit
    return at_limit & (up >= activation.limit), at_limit & (up <= -activation.limit)


def activation_variance(
    activation: Activation,
    gate: Tensor,
    gate_variance: Tensor,
    up_variance: Tensor,
    slope: Slopes,
    at_gate: Format,
    at_hidden: Format,
) -> Tensor:
    """Squared error of the activation's result: slopes, curvature where they vanish, its arithmetic, its roundings."""
    activated = slope.a * slope.b
    if activation.name in CANCELLING:
        arithmetic = SIGMOID_ROUNDOFFS * gate * slope.b
    elif activation.name == "relu2_no_mul":
        arithmetic = 2 * activated
    else:
        steepness = activation.alpha if activation.name == "swigluoai" else 1.0
        arithmetic = (SIGMOID_ROUNDOFFS + steepness * gate.abs()) * activated
    return (
        slope.of_gate**2 * gate_variance
        + (activation.curvature / 2 * gate_variance * slope.b) ** 2
        + slope.of_up**2 * up_variance
        + (FLOAT32.unit_roundoff * arithmetic) ** 2
        + rounding(slope.a, at_gate) * slope.b**2
        + rounding(activated, at_hidden)
    )


def activation_floor(
    activation: Activation,
    gate: Tensor,
    slope: Slopes,
    gate_floor: Tensor,
    up_floor: Tensor,
    at_gate_up: Format,
    at_gate: Format,
    at_hidden: Format,
) -> Tensor:
    """The linear part: what roundings leave in the activation's result that go one way along a row.

    They are those below the smallest normal, and the activation's own where it is nearly the identity: A(g) of a large
    g is g less a little, and where g stands on the grid to which A(g) is rounded, all of that little is lost.
    """
    short = (gate - slope.a).abs()
    after = at_gate if activation.is_gated else at_hidden
    step = min(at_gate_up.unit_roundoff, after.unit_roundoff) * gate.abs()
    kept = torch.where((at_gate_up == after) & (short <= step), short, 0.0)
    return (
        kept * slope.b.abs()
        + slope.of_gate.abs() * gate_floor
        + slope.of_up.abs() * up_floor
        + slope.b.abs() * floor(slope.a, at_gate)
        + floor(slope.a * slope.b, at_hidden)
    )
