"""A subject whose failing calls become verdicts: what the suite calls, so that no exception of a subject ends a run."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from .bounds import cause_of
from .device_errors import DeviceGoneError, Trouble, asked_for, first_line, trouble_of
from .judge import Verdict
from .properties.subject import FITS, RETURNS, SURVIVES, WITHIN
from .subject import Subject

# Calls that take a case and return tensors, by how many; the others return objects, which their families judge.
RESULTS = {"route": 2, "align": 3, "experts": 1, "batched": 1, "quantize": 2, "shared": 1}


class CallError(Exception):
    """A call that gave no result to judge; carries the verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.detail)
        self.verdict = verdict


def verdict_of(name: str, error: Exception, caller: str) -> Verdict:
    """The verdict on a call that raised.

    Args:
        name: of the call.
        error: what it raised.
        caller: the file that made the call, whose lines are not the subject's.

    Raises:
        DeviceGoneError: the error says that, which is no verdict on the subject.
    """
    outside = cause_of(error)
    if outside is not None:
        return WITHIN.verdict(False, f"{name}: {outside}")
    trouble = trouble_of(error)
    if trouble is Trouble.GONE:
        raise DeviceGoneError(f"{name}: {first_line(error)}") from error
    if trouble is Trouble.FULL:
        return FITS.verdict(False, f"{name} asked for {asked_for(error)}: {first_line(error)}{_where(error, caller)}")
    if trouble is Trouble.BROKEN:
        return SURVIVES.verdict(False, f"{name} left its device unusable: {first_line(error)}{_where(error, caller)}")
    raised = f"{name} raised {type(error).__name__}: {error}{_where(error, caller)}"
    return RETURNS.verdict(False, f"{raised}; do the capabilities say too much?")


def guarded(subject: Subject) -> Subject:
    """The subject, whose calls of `RESULTS` and `prepare` raise `CallError`, and `DeviceGoneError` of a lost device."""
    return cast(Subject, _Guarded(subject))


class _Guarded:
    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._subject, name)
        return _guard(name, value) if name in RESULTS or name == "prepare" else value


def _guard(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def checked(*arguments: Any, **options: Any) -> Any:
        try:
            result = call(*arguments, **options)
        except (CallError, DeviceGoneError):
            raise
        except Exception as error:
            raise CallError(verdict_of(name, error, __file__)) from error
        count = RESULTS.get(name, 0)
        if count == 1 and not isinstance(result, Tensor):
            raise CallError(RETURNS.verdict(False, f"{name}: expected a tensor, got {_said(result)}"))
        if count > 1 and not _are_tensors(result, count):
            raise CallError(RETURNS.verdict(False, f"{name}: expected {count} tensors, got {_said(result)}"))
        return result

    return checked


def _are_tensors(result: Any, count: int) -> bool:
    return isinstance(result, (tuple, list)) and len(result) == count and all(isinstance(t, Tensor) for t in result)


def _said(result: Any) -> str:
    if isinstance(result, (tuple, list)):
        return f"{type(result).__name__} of {[type(each).__name__ for each in result]}"
    return type(result).__name__


def _where(error: Exception, caller: str) -> str:
    """The innermost line of the subject that the exception came through, libraries left out."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and frame.filename != caller
    ]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
