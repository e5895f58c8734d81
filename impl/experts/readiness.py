"""Whether a backend's kernel can be used in this process: a fact of the installation, apart from what it can compute.

What a backend can compute is its `refusal`, which is asked for any platform on any machine. What is installed is its
`readiness`, which is asked for this machine alone and handed to the oracle as a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How near a kernel is."""

    READY = "ready"
    ON_REQUEST = "on_request"
    ABSENT = "absent"


@dataclass(frozen=True)
class Readiness:
    """One backend's state, and why it is no better.

    Attributes:
        state: ready to be chosen; usable only where the user names the backend, since it costs something that nobody
            should pay unasked (a compilation of many minutes); or absent.
        why: what is missing, in words for the user; empty where ready.

    Raises:
        ValueError: a state that is not ready, without its reason.
    """

    state: State
    why: str = ""

    def __post_init__(self) -> None:
        if self.state is not State.READY and not self.why:
            raise ValueError(f"why: expected a reason for the state {self.state}, got an empty one")


READY = Readiness(State.READY)


def absent(why: str) -> Readiness:
    """A kernel that is not there."""
    return Readiness(State.ABSENT, why)


def on_request(why: str) -> Readiness:
    """A kernel that is used only where the user asks for it by name."""
    return Readiness(State.ON_REQUEST, why)
