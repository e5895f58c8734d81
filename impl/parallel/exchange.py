"""What every way to exchange tokens between ranks is: a dispatch before the experts and a combine behind them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .wire import Tokens


@dataclass(frozen=True, eq=False)
class Received:
    """What a rank's experts work on.

    Attributes:
        tokens: those that came here; a token whose ids are all -1 is padding.
        ticket: what the exchange's `combine` needs of its `dispatch`.
    """

    tokens: Tokens
    ticket: Any = None


class Launched:
    """A dispatch under way; other work may be enqueued before `wait`."""

    def __init__(self, finish: Callable[[], Received]) -> None:
        self._finish = finish

    def wait(self) -> Received:
        """What arrived."""
        return self._finish()


class Exchange(ABC):
    """A `dispatch` and the `combine` that undoes it. There is no default: a rank that kept its tokens would be wrong.

    Attributes:
        name: by which it is chosen, and errors speak of it.
    """

    name: ClassVar[str]

    @abstractmethod
    def dispatch(self, tokens: Tokens, padded_tokens: int) -> Launched:
        """Send the rank's tokens to where their experts are.

        Args:
            tokens: with physical ids.
            padded_tokens: rows that each rank has with its padding, the same on every rank and at least M.
        """

    @abstractmethod
    def combine(self, partial: torch.Tensor, received: Received, shared: torch.Tensor | None = None) -> torch.Tensor:
        """The sums of this rank's own tokens.

        Args:
            partial: `[rows, H]`, what the experts here make of what was received; it may be written into.
            received: from `dispatch`.
            shared: `[M, H]` of this rank's own tokens, a part of a sum over the replicas; or None.

        Returns:
            `[M, H]`, of memory that is the caller's.
        """
