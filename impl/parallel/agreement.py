"""What ranks tell each other before they go on together: whether something went wrong, and what must be the same.

A rank that raises while its peers wait for it hangs them all. So at set-up always, and in debug mode before each
collective of a layer (`checks.debug_checks`), every rank says how it stands, and where one raised or they disagree, all
raise the same error. Debug mode is on for all ranks or for none. Without it nothing is asked, and the process group's
own timeout ends a wait.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import debugging
from .collectives import Group

# Bytes of one rank's message; an error's text is cut to fit.
MESSAGE = 2048
_TEXT = 1024


def agree(group: Group, facts: Mapping[str, Any], error: Exception | None = None) -> None:
    """Tell the ranks of a group how this one stands, and raise what all of them raise.

    Args:
        group: all of whose ranks call this.
        facts: plain values by name, which must be the same on every rank.
        error: what this rank would raise.

    Raises:
        Exception: of the class of the first rank's error that has one (a RuntimeError for a class that is no built-in),
            with the rank before its text.
        ValueError: facts that differ, with each rank's.
    """
    failed = None if error is None else [type(error).__name__, str(error)[:_TEXT]]
    messages = _messages(group, {"error": failed, "facts": dict(facts) if error is None else {}})
    for rank, message in enumerate(messages):
        if message["error"] is not None:
            name, text = message["error"]
            kind = getattr(builtins, name, RuntimeError)
            raised = kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError
            raise raised(f"rank {rank}: {text}") from error
    for name in facts:
        expect_alike(name, [message["facts"].get(name) for message in messages])


def expect_alike(name: str, values: Sequence[Any]) -> None:
    """Refuse what each rank, in their order, says of a fact.

    Raises:
        ValueError: they differ.
    """
    if any(value != values[0] for value in values):
        raise ValueError(f"{name}: expected the same on every rank, got {values} of ranks 0 to {len(values) - 1}")


def _messages(group: Group, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = json.dumps(mine).encode()
    if len(text) > MESSAGE:
        raise ValueError(f"facts: expected at most {MESSAGE} bytes as JSON, got {len(text)}")
    sent = torch.zeros((1, MESSAGE), dtype=torch.uint8)
    sent[0, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    sent = sent.to(group.device)
    received = torch.empty((group.size, MESSAGE), dtype=torch.uint8, device=group.device)
    group.all_gather(received, sent).wait()
    return [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in received.cpu()]


@dataclass
class _Meetings:
    """The meetings of one block's ranks in its midst.

    Attributes:
        group: of the block.
        left: how many are to come.
        is_told: one of them raised what all ranks raise.
    """

    group: Group
    left: int
    is_told: bool = False


_meetings: ContextVar[_Meetings | None] = ContextVar("moegate_meetings", default=None)


def meet() -> None:
    """Before a collective in the midst of a block that says how many it has (`together`): does every rank come to it?

    In debug mode; elsewhere nothing is asked.

    Raises:
        Exception: what a rank raised that will not come, as `agree`.
    """
    meetings = _meetings.get()
    if meetings is None:
        return
    meetings.left -= 1
    meetings.is_told = True
    agree(meetings.group, {})
    meetings.is_told = False


@contextmanager
def together(group: Group, facts: Mapping[str, Any], *, always: bool = False, meetings: int = 0) -> Iterator[None]:
    """A block of one rank's own work before the ranks meet: an error in it becomes every rank's, in debug mode.

    Args:
        group: whose ranks all enter such a block.
        facts: must be the same on every rank; read when the block ends.
        always: also without debug mode.
        meetings: how often a rank meets others of the group in the block, at most and the same everywhere: a rank that
            has nothing to bring meets them at its end.

    Raises:
        Exception: as `agree`; without debug mode whatever the block raises.
    """
    if not (always or debugging()):
        yield
        return
    error, midst = None, _Meetings(group, meetings)
    token = _meetings.set(midst)
    try:
        yield
    except Exception as raised:
        if midst.is_told:
            raise
        error = raised
    finally:
        _meetings.reset(token)
    for _ in range(midst.left if error is None else 0):
        agree(group, {})
    agree(group, facts, error)
