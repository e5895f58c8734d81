"""A subject whose failing calls become verdicts: what the suite calls, so that no exception of a subject ends a run."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from .judge import Verdict
from .properties.subject import RETURNS
from .subject import Subject

# Calls that take a case and return tensors, by how many; the others return objects, which their families judge.
RESULTS = {"route": 2, "align": 3, "experts": 1, "batched": 1, "quantize": 2, "shared": 1}


class CallError(Exception):
    """A call that gave no result to judge; carries the verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.detail)
        self.verdict = verdict


def guarded(subject: Subject) -> Subject:
    """The subject, whose calls of `RESULTS` and `prepare` raise `CallError` and nothing else."""
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
        except CallError:
            raise
        except Exception as error:
            detail = f"{name} raised {type(error).__name__}: {error}{_where(error)}; do the capabilities say too much?"
            raise CallError(RETURNS.verdict(False, detail)) from error
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


def _where(error: Exception) -> str:
    """The innermost line of the subject that the exception came through, libraries left out."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and frame.filename != __file__
    ]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
