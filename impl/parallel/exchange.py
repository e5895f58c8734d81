"""What every way to exchange tokens between ranks is: a dispatch before the experts and a combine behind them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .landing import Landing
from .wire import Tokens


@dataclass(frozen=True, eq=False)
class Received:
    """What a rank's experts work on.

    Attributes:
        tokens: those that came here; a token whose ids are all -1 is padding.
        ticket: what the exchange's `combine` needs of its `dispatch`.
        sums: `[rows, H]`, where the experts write their part of the sums; None: anywhere.
        landing: whose memory the tokens and the sums are in; None: in memory of this call's own.
    """

    tokens: Tokens
    ticket: Any = None
    sums: torch.Tensor | None = None
    landing: Landing | None = None


class Launched:
    """A dispatch under way; other work may be enqueued before `wait`.

    As a context it waits after an error in its block, if nobody has, and asks for what is to come again: what is under
    way is still written, and a collective that is still to come has peers that wait for it.

    Attributes:
        own: the rank's own tokens, for its experts here; None where they come with the others.
    """

    def __init__(
        self,
        finish: Callable[[], Received],
        own: Received | None = None,
        again: Callable[[], Received | None] | None = None,
    ) -> None:
        self._finish, self.own, self._again = finish, own, again
        self._received: Received | None = None

    def wait(self) -> Received:
        """What arrived: everybody's tokens, or, with `own`, the other ranks'."""
        if self._received is None:
            self._received = self._finish()
        return self._received

    def again(self) -> Received | None:
        """Once the experts' work on what arrived was launched: None, or what they are to work on instead of it."""
        again, self._again = self._again, None
        return None if again is None else again()

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.wait()
            self.again()


class Exchange(ABC):
    """A `dispatch` and the `combine` that undoes it. There is no default: a rank that kept its tokens would be wrong.

    Attributes:
        name: by which it is chosen, and errors speak of it.
    """

    name: ClassVar[str]

    @abstractmethod
    def dispatch(
        self, tokens: Tokens, padded_tokens: int, *, own_first: bool = False, runs_beside: bool = True
    ) -> Launched:
        """Send the rank's tokens to where their experts are.

        Args:
            tokens: with physical ids.
            padded_tokens: rows that each rank has with its padding, the same on every rank and at least M.
            own_first: the rank's own tokens stay apart, so that its experts can work on them meanwhile.
            runs_beside: the caller enqueues work that is to run while tokens travel.
        """

    @abstractmethod
    def combine(
        self,
        partial: torch.Tensor,
        received: Received,
        shared: torch.Tensor | None = None,
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sums of this rank's own tokens.

        Args:
            partial: `[rows, H]`, what the experts here make of what was received; it may be written into.
            received: from `dispatch`.
            shared: `[M, H]` of this rank's own tokens, a part of a sum over the replicas; or None.
            own: `[M, H]`, what the experts here make of this rank's own tokens, where those stayed apart.

        Returns:
            `[M, H]`, of memory that is the caller's.
        """
