"""How many rows an all-to-all is to carry, as the last calls suggest: rows can leave before the host knows.

Every rank sees the numbers of all ranks, and what it expects follows from those of earlier calls alone: so all expect
the same, and know alike whether it held. A call with more rows than there is room for is exchanged anew, which costs as
much as it would have saved many times; so room is some more than was needed, is trusted only once a call has kept to
it, and after every call that did not only after twice as many that did.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

Numbers = np.ndarray
"""`[num_ranks, num_ranks]` int32 on the host: rows from each rank to each."""

# Numbers of padded tokens that are remembered, and calls in a row that are asked for at most.
_MOST_KNOWN, _MOST_KEPT = 64, 64
# Of what room was made for so much must still be needed: rows that travel as padding cost their time on the links.
_LEAST_USED = 8 / 9


def round_up(num_rows: int) -> int:
    """At most a sixteenth more rows, and one of few numbers: calls whose rows differ by little have one form."""
    step = max(1, 1 << max(0, num_rows.bit_length() - 5))
    return -(-num_rows // step) * step


def room_for(numbers: Numbers, most: int) -> Numbers:
    """More rows than `numbers`, at most `most`: where each token goes by itself, they spread by a root of the mean."""
    more = numbers + (2 * np.sqrt(numbers)).astype(numbers.dtype)
    return np.array([[min(round_up(number), most) for number in row] for row in more.tolist()], dtype=numbers.dtype)


@dataclass(frozen=True, eq=False)
class Room:
    """Rows that are set aside, for each rank from each.

    Attributes:
        sent: by this rank, for each.
        received: by this rank, from each.
        on_device: `[num_ranks]` int32, `sent`, where kernels read it.
    """

    sent: list[int]
    received: list[int]
    on_device: torch.Tensor


@dataclass(eq=False)
class _Known:
    rows: Numbers  # set aside
    total: int  # of the numbers that they were set aside for
    needed: int  # calls in a row that must keep to it
    kept: int = 0
    room: Room | None = None

    @property
    def is_trusted(self) -> bool:
        return self.kept >= self.needed


class ExpectedRows:
    """What one exchange expects, for each number of padded tokens.

    Args:
        rank: this one.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._known: dict[int, _Known] = {}

    def room(self, padded_tokens: int, device: torch.device) -> Room | None:
        """For the next call; None where its numbers have to be waited for."""
        known = self._known.get(padded_tokens)
        if known is None or not known.is_trusted:
            return None
        if known.room is None:
            sent, received = known.rows[self._rank], known.rows[:, self._rank]
            known.room = Room(sent.tolist(), received.tolist(), torch.tensor(sent, device=device))
        return known.room

    def learn(self, padded_tokens: int, numbers: Numbers) -> bool:
        """Whether a call kept to the room that was expected for it.

        Args:
            padded_tokens: of the call.
            numbers: the rows from each rank to each.
        """
        known, total = self._known.get(padded_tokens), int(numbers.sum())
        fits = known is not None and bool((numbers <= known.rows).all())
        if known is not None and fits and total >= _LEAST_USED * known.total:
            known.kept += 1
            return True
        needed = 1
        if known is not None:
            failed = known.is_trusted and not fits
            needed = min(2 * known.needed, _MOST_KEPT) if failed else known.needed
        self._known.pop(padded_tokens, None)
        while len(self._known) >= _MOST_KNOWN:
            self._known.pop(next(iter(self._known)))
        self._known[padded_tokens] = _Known(room_for(numbers, padded_tokens), total, needed)
        return fits
