"""The process of an isolated subject: loads it, forks a worker that answers calls, and another when that one dies.

This process itself never calls the subject, and so never touches a GPU: a fork would not survive that. Where loading
alone has touched it, there is no fork, and the process that started this one starts it again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import torch

from .bounds import CHECKED
from .device_errors import DeviceGoneError, Trouble, settle_device, trouble_of
from .guarded import verdict_of
from .isolated import Handle, receive, send, warm_up
from .loading import NotInstalledError, load_subject
from .properties.hygiene import poisoned_allocations
from .subject import Subject

# Prepared weights that are kept: a case is called a few times, then comes the next.
KEPT = 8
# The exit status of a worker whose device is broken; it has said so before.
BROKEN = 77


def main() -> None:
    """Serve calls of the subject that the command line names."""
    calls, replies = os.dup(0), os.fdopen(os.dup(1), "wb")
    # What the subject prints is no message.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    torch.set_num_threads(1)
    try:
        if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
            _repair_interpreter()
        subject = load_subject(sys.argv[1])
    except (ValueError, NotInstalledError) as error:
        send(replies, {"refused": str(error), "installed": not isinstance(error, NotInstalledError)})
        return
    if torch.cuda.is_initialized():
        _serve(subject, calls, replies)
        return
    warm_up()
    while True:
        worker = os.fork()
        if not worker:
            _serve(subject, calls, replies)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if status == 0:  # nobody asks any more
            return
        send(replies, {"died": status})


def _repair_interpreter() -> None:
    """Repair Triton's interpreter, where this Python has Triton at all.

    Raises:
        ValueError: a release that cannot be repaired, which would judge wrongly.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from . import interpreter

    try:
        interpreter.install()
    except interpreter.UnsupportedInterpreterError as error:
        raise ValueError(f"subject: {error}") from error


def _serve(subject: Subject, calls: int, replies: BinaryIO) -> None:
    """Answer calls until there are no more."""
    prepared: dict[int, Any] = {}
    send(replies, {"worker": os.getpid()})
    while (message := receive(calls, None)) is not None:
        number, method, arguments, options, storages, conditions = message
        launches = CHECKED.total()
        try:
            with _under(conditions):
                result = _answer(subject, prepared, method, arguments, options)
            settle_device()
        except Exception as error:
            is_over = trouble_of(error) in (Trouble.BROKEN, Trouble.GONE)
            send(replies, {"number": number, "is_over": is_over, **_refusal(method, error)})
            if is_over:  # whatever this process asked of its device now would fail with the same error
                os._exit(BROKEN)
        else:
            reply = {"number": number, "result": result, "storages": storages}
            send(replies, reply | {"launches": CHECKED.total() - launches})


def _refusal(method: str, error: Exception) -> dict[str, str]:
    try:
        verdict = verdict_of(method, error, __file__)
    except DeviceGoneError as gone:
        return {"gone": str(gone)}
    return {"violated": verdict.property.id, "detail": verdict.detail}


def _answer(subject: Subject, prepared: dict[int, Any], method: str, arguments: list[Any], options: Any) -> Any:
    if method == "describe":
        return _described(subject, *arguments)
    if method == "prepare":
        number = max(prepared, default=0) + 1
        prepared[number] = subject.prepare(*arguments)
        prepared.pop(number - KEPT, None)
        return Handle(number)
    resolved = [
        replace(each, prepared=prepared[each.prepared.number])
        if isinstance(getattr(each, "prepared", None), Handle)
        else each
        for each in arguments
    ]
    return getattr(subject, method)(*resolved, **options)


def _described(subject: Subject, device: str) -> dict[str, Any]:
    unavailable = {variant: subject.unavailable(variant, device) for variant in subject.variants}
    return {
        "name": subject.name,
        "variants": tuple(subject.variants),
        "numerics": subject.numerics,
        "deviations": dict(subject.deviations),
        "last_run": subject.last_run,
        "standalone": subject.standalone,
        "capabilities": subject.capabilities,
        "unavailable": unavailable,
        "facets": {variant: subject.facets(variant) for variant in subject.variants},
    }


@contextlib.contextmanager
def _under(conditions: dict[str, bool]) -> Iterator[None]:
    """The conditions of the caller's process."""
    backwards: Any = contextlib.nullcontext()
    if conditions["backwards"]:
        from . import interpreter

        backwards = interpreter.programs_reversed()
    with poisoned_allocations(conditions["poisoned"]), backwards:
        yield


if __name__ == "__main__":
    main()
