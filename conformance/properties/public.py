"""API: everything public that takes an argument, from what a subject says that its arguments may be.

A subject lists its public functions and classes, each with a call that is right, what each argument may be, and what
some calls must answer. From that the suite makes the calls that are wrong (`bad_input.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..judge import Verdict, declare
from .bad_input import Arguments, Bad, Change, Contents, Kind, bad_arguments, refusal_of, time_limit

REFUSED = declare("API-04", "every public call refuses, by name, what its arguments may not be", "public")
NOTHING_DONE = declare(
    "API-05", "a public call that is refused has launched nothing, written no file and changed no operand", "public"
)
TAKEN = declare("API-06", "every public call takes what its arguments may be, up to the ends of their ranges", "public")
ANSWERED = declare("API-07", "a public call answers what is documented of it, on calls that say all of that", "public")


@dataclass(frozen=True)
class Answer:
    """What a call must answer.

    Attributes:
        what: is asked, in a few words.
        wrong: what is wrong with the answer, in words; empty (or None) where nothing is.
        change: takes the good keyword arguments and returns those of this call.
    """

    what: str
    wrong: Callable[[Any], str | None]
    change: Change = dict


@dataclass(frozen=True)
class PublicCall:
    """A public function with arguments that are right.

    Attributes:
        name: below the implementation's package; methods as `module.Class.method`, with the object as `self`.
        call: the function.
        good: makes arguments that it accepts.
        kinds: what its arguments may be.
        rows: what the arguments only together say wrong.
        needs: what the right call needs that a test of one process has not; empty where nothing.
        edges: more calls that it takes, in words and by what they change.
        answers: what some calls must answer.
    """

    name: str
    call: Callable[..., Any]
    good: Callable[[], Arguments]
    kinds: Mapping[str, Kind]
    rows: Sequence[Bad] = field(default_factory=tuple)
    needs: str = ""
    edges: Sequence[tuple[str, Change]] = field(default_factory=tuple)
    answers: Sequence[Answer] = field(default_factory=tuple)

    @property
    def bad(self) -> list[Bad]:
        """Every bad call."""
        return [*bad_arguments(self.kinds), *self.rows]


def judge_public_call(call: PublicCall, trace: Callable[[], AbstractContextManager[Any]] | None) -> list[Verdict]:
    """Every API verdict on one public call.

    Args:
        call: the call.
        trace: records what is launched; None where a subject has no such record.
    """
    verdicts = []
    for bad in call.bad:
        arguments = bad.change(call.good())
        contents, files = Contents(arguments), os.listdir()
        with nullcontext() if trace is None else trace() as record:
            wrong = refusal_of(lambda arguments=arguments: call.call(**arguments), bad.argument)
        verdicts.append(REFUSED.verdict(not wrong, f"{call.name}-{bad}: {wrong}"))
        done = [f"changed {name}" for name in contents.changed()]
        done += [f"wrote {name}" for name in sorted({*os.listdir()} - {*files})]
        done += [] if record is None else [f"launched {name}" for name in record.launches]
        verdicts.append(NOTHING_DONE.verdict(not done, f"{call.name}-{bad}: {done}"))
    if call.needs:
        return verdicts
    for what, change in (("as it is", dict), *call.edges):
        verdicts.append(TAKEN.verdict(not (said := _error_of(call, change)), f"{call.name}-{what}: raised {said}"))
    for answer in call.answers:
        said = _wrong(call, answer)
        verdicts.append(ANSWERED.verdict(not said, f"{call.name}-{answer.what}: {said}"))
    return verdicts


def _error_of(call: PublicCall, change: Change) -> str:
    try:
        with time_limit():
            call.call(**change(call.good()))
    except Exception as error:  # of whatever class, it is the finding
        return f"{type(error).__name__}: {error}"
    return ""


def _wrong(call: PublicCall, answer: Answer) -> str:
    try:
        with time_limit():
            return answer.wrong(call.call(**answer.change(call.good()))) or ""
    except Exception as error:  # of whatever class, it is the finding
        return f"raised {type(error).__name__}: {error}"
