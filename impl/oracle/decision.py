"""What the oracle answers: the backend, its experts, and of every candidate why it was taken or passed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..experts.base import Experts
from .backends import UnquantizedMoeBackend


@dataclass(frozen=True, slots=True)
class Reason:
    """Why one candidate was taken or passed over.

    Attributes:
        candidate: the backend.
        taken: whether it is the decision.
        why: in words for the user.
        source: the public record of the rule, or what knows it (a predicate, this installation, the request).
        demotions: the names of the rules that moved it back, in the order applied.
    """

    candidate: UnquantizedMoeBackend
    taken: bool
    why: str
    source: str
    demotions: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "candidate": str(self.candidate),
            "taken": self.taken,
            "why": self.why,
            "source": self.source,
            "demotions": list(self.demotions),
        }


@dataclass(frozen=True, slots=True)
class Decision:
    """The oracle's answer.

    Attributes:
        backend: who computes the routed experts.
        experts: the class that does it; None where the platform brings its own (TPU, out-of-tree).
        reasons: one for every candidate, in the order of the line.
        demotions: the names of the demotion rules that hold, in the order applied.
        warnings: what the user should be told: a request that LoRA overrides.
    """

    backend: UnquantizedMoeBackend
    experts: type[Experts] | None
    reasons: tuple[Reason, ...]
    demotions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        experts = "the platform's own experts" if self.experts is None else self.experts.__name__
        passed = "; ".join(f"{r.candidate}: {r.why}" for r in self.reasons if not r.taken)
        taken = next(r.why for r in self.reasons if r.taken)
        return f"{self.backend} ({experts}): {taken}" + (f". Passed over: {passed}" if passed else "")


class BackendRefusedError(ValueError):
    """No backend may serve: the one asked for cannot, or none can.

    Attributes:
        reasons: one for every candidate, in the order of the line; none is taken.
        demotions: the names of the demotion rules that hold, in the order applied.
    """

    def __init__(self, message: str, reasons: tuple[Reason, ...] = (), demotions: tuple[str, ...] = ()):
        super().__init__(message)
        self.reasons = reasons
        self.demotions = demotions
