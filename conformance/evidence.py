"""What a wrong output looks like: its worst element by token, expert, column and tile, and what its numbers are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference.experts import Trace
from .spec import TILE

# How much of a row's error must lie along one expert's share before that expert is named.
_ALONG = 0.9


@dataclass(frozen=True)
class Blame:
    """An expert of the worst token, and where the token stands among the expert's tokens.

    Attributes:
        expert: its local id.
        share: the row's error as a multiple of this expert's share of the row, -1 where the expert is lost; None where
            the error does not lie along any one expert's share, and the one that is named is only the token's largest.
        row: the token's place among the tokens of this expert, in ascending order.
        first_row, first_column: where the tile of 16 rows and 16 columns begins that the element is in.
    """

    expert: int
    share: float | None
    row: int
    first_row: int
    first_column: int


@dataclass(frozen=True)
class Evidence:
    """Where an output is worst, and statistics of all of it.

    Attributes:
        token, column: of the worst element.
        expected, got: its value.
        over_budget: its error over its bound.
        experts: the token's experts, as the call's ids and as local ids.
        blame: which of them, where they are known.
        elements, over: how many elements were judged, and how many of them are over their bound.
        nan, infinite, zero: how many elements are.
        row_gain: the slope of the worst element's row on what was expected; None of a row of zeros.
    """

    token: int
    column: int
    expected: float
    got: float
    over_budget: float
    elements: int
    over: int
    nan: int
    infinite: int
    zero: int
    row_gain: float | None
    experts: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    blame: Blame | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the report; numbers that JSON does not have are texts."""
        plain = asdict(self)
        for name in ("expected", "got", "over_budget", "row_gain"):
            value = plain[name]
            if value is not None and value - value != 0:  # NaN or infinite
                plain[name] = str(value)
        return plain

    def text(self) -> str:
        """Several lines for people, without an end of line."""
        ids, local = self.experts
        experts = f", experts {list(ids)} (local {list(local)})" if ids else ""
        lines = [
            f"token {self.token}, column {self.column}{experts}: expected {self.expected:.6g}, got {self.got:.6g}; "
            f"error over budget {self.over_budget:.3g}"
        ]
        if self.blame is not None:
            lines.append(self._blamed(self.blame))
        gain = "-" if self.row_gain is None else f"{self.row_gain:.4g}"
        lines.append(
            f"  numbers: {self.over} of {self.elements} elements over; NaN {self.nan}, infinite {self.infinite}, "
            f"zero {self.zero}; gain of the row {gain}"
        )
        return "\n  ".join(lines)

    @staticmethod
    def _blamed(blame: Blame) -> str:
        where = (
            f"  tile:    row {blame.row} of local expert {blame.expert}'s tokens (rows {blame.first_row} to "
            f"{blame.first_row + TILE - 1}), columns {blame.first_column} to {blame.first_column + TILE - 1}"
        )
        if blame.share is None:
            return f"  expert:  no single one explains the row's error\n  {where}"
        what = "which is lost" if abs(blame.share + 1) < 0.02 else f"whose share is {1 + blame.share:.4g} times there"
        return f"  expert:  local {blame.expert}, {what}\n  {where}"


def evidence_of(
    output: Tensor, expected: Tensor, over: Tensor, *, ids: Tensor | None = None, trace: Trace | None = None
) -> Evidence:
    """The evidence of an output `[M, H]` against what was expected.

    Args:
        output: what was returned.
        expected: `[M, H]`.
        over: `[M, H]`, each element's error over its bound.
        ids: `[M, top_k]`, the call's own ids, or None.
        trace: the reference's, which knows the experts' shares, or None.
    """
    token, column = divmod(int(over.nan_to_num(torch.inf).argmax()), output.shape[1])
    wanted, got = expected[token].double(), output[token].double()
    norm = float((wanted**2).sum())
    experts, blame = ((), ()), None
    if trace is not None and trace.local_ids.shape[1]:
        local = tuple(trace.local_ids[token].tolist())
        experts = (local if ids is None else tuple(ids[token].tolist()), local)
        blame = _blame(trace, got - wanted, token, column)
    return Evidence(
        token=token,
        column=column,
        expected=float(expected[token, column]),
        got=float(output[token, column]),
        over_budget=float(over[token, column]),
        elements=output.numel(),
        over=int((over > 1).sum()),
        nan=int(torch.isnan(output).sum()),
        infinite=int(torch.isinf(output).sum()),
        zero=int((output == 0).sum()),
        row_gain=None if norm == 0 else float((got * wanted).sum()) / norm,
        experts=experts,
        blame=blame,
    )


def _blame(trace: Trace, error: Tensor, token: int, column: int) -> Blame | None:
    """Which of the token's experts its row's error lies along; None of a token without an expert here."""
    slots = [slot for slot, expert in enumerate(trace.local_ids[token].tolist()) if expert >= 0]
    if not slots:
        return None
    shares = (trace.output_weights[token, :, None] * trace.expert_output[token]).double()
    sizes = (shares**2).sum(dim=1)
    along = (shares * error.nan_to_num()).sum(dim=1)
    size = float((error.nan_to_num() ** 2).sum())
    explained = [float(along[s] ** 2 / (sizes[s] * size)) if sizes[s] > 0 and size > 0 else 0.0 for s in slots]
    best = max(range(len(slots)), key=explained.__getitem__)
    share = None
    if explained[best] > _ALONG**2 and bool(torch.isfinite(error).all()):
        share = float(along[slots[best]] / sizes[slots[best]])
    slot = slots[best] if share is not None else max(slots, key=lambda s: float(sizes[s]))
    expert = int(trace.local_ids[token, slot])
    row = int((trace.local_ids[:token] == expert).sum())
    return Blame(expert, share, row, row // TILE * TILE, column // TILE * TILE)
