"""The limits of the budget's statistics, as `python -m moegate.conformance.calibrate` fitted them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Limits:
    """Largest value of each statistic that an honest implementation may show (see `statistics.py`).

    Attributes:
        elementwise: lambda, of the error beyond the last rounding over sigma.
        row_rms: of a row's RMS error over its RMS budget.
        row_gain: of a row's gain error over its standard error.
        expert_gain: of one expert's gain error over its standard error.
    """

    elementwise: float
    row_rms: float
    row_gain: float
    expert_gain: float


KINDS = ("rounded", "quantized")
"""Errors are sums of many roundings, or come in whole steps of quantised activations: two tails, two sets of limits.

Few large steps make a heavier tail than many small roundings do, at the same variance; kept apart, they do not loosen
what is asked of layers that do not quantise.
"""


@cache
def limits(is_quantized: bool = False) -> Limits:
    """The checked-in calibration, for calls whose activations are quantised or not."""
    data = json.loads(files(__package__).joinpath("calibration.json").read_text())
    fitted = data[KINDS[is_quantized]]["limits"]
    return Limits(**{f.name: fitted[f.name] for f in fields(Limits)})
