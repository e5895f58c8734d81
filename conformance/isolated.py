"""A subject in a process of its own: what crashes, hangs or cannot live beside us ends one case, and not the run.

The process (`isolated_child.py`) loads the subject once and forks a worker, which answers the calls; a worker that dies
is replaced by another fork at once. It may run under another Python, with the packages that are there
(`--subject-python`). Operands travel whole, poisoned margins included, and are written back, so that every property
sees what the call did to them.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arena import Arena
from .bounds import CHECKED
from .device_errors import DeviceGoneError
from .guarded import RESULTS, CallError
from .judge import PROPERTIES
from .loading import NotInstalledError
from .properties.hygiene import poisoned_allocations
from .properties.subject import ENDS, SURVIVES
from .subject import Subject

HEADER = struct.Struct("<Q")
# Loading a subject may import an engine, and compile.
START_SECONDS = 600.0


class LoadError(ValueError):
    """The subject does not load in its process."""


@dataclass(frozen=True)
class Handle:
    """What stands for an object that stays in the subject's process."""

    number: int


def storages(value: Any) -> Iterator[Tensor]:
    """The whole memory of every tensor in a value: of dataclasses, lists, tuples and mappings too."""
    if isinstance(value, Tensor):
        # In the tensor's own dtype: what is saved together must not see one memory as two.
        yield torch.tensor([], dtype=value.dtype, device=value.device).set_(value.untyped_storage())
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from storages(getattr(value, f.name))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from storages(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from storages(each)


class Isolated(Subject):
    """Stands for a subject that lives in another process.

    Its calls are those that take a case and return tensors; what returns other objects (a trace, an oracle) stays with
    the process, and is not judged.

    Args:
        name: of the subject, for `load_subject`.
        device: torch device type.
        timeout: seconds for a call.
        python: the interpreter; this one's where None.

    Raises:
        LoadError: the subject does not load there; with its reason.
        NotInstalledError: what it needs is not installed there.
    """

    def __init__(self, name: str, device: str, timeout: float, python: str | None = None) -> None:
        self._asked, self._device, self._timeout = name, device, timeout
        self._python = python or sys.executable
        self._folder = tempfile.TemporaryDirectory(prefix="moegate-subject-")
        self._process: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._worker: int | None = None  # and never 0, which would be this process's group
        described = self._call("describe", device)
        self.name = described["name"]
        self.variants = described["variants"]
        self.numerics = described["numerics"]
        self.deviations = described["deviations"]
        self.last_run = described["last_run"]
        self.standalone = described["standalone"]
        can = described["capabilities"]
        # A function of the case's own does not travel, and streams of another process cannot be held up.
        scorings = tuple(scoring for scoring in can.scorings if scoring != "custom")
        self.capabilities = replace(can, scorings=scorings or can.scorings, overlap=False)
        self._facets, self._unavailable = described["facets"], described["unavailable"]
        for facet in RESULTS:
            setattr(self, facet, partial(self._call, facet))

    def facets(self, variant: str) -> tuple[str, ...]:
        """Those of the subject that are calls on cases."""
        return tuple(facet for facet in self._facets[variant] if facet in RESULTS)

    def unavailable(self, variant: str, device: str) -> str | None:
        """What the subject says in its process."""
        del device
        return self._unavailable[variant]

    def prepare(self, case: Any, variant: str) -> Handle:
        """A handle of what the subject made of the weights, which stays with it."""
        return self._call("prepare", case, variant)

    def fresh(self) -> Isolated:
        """This subject with a worker that was asked nothing yet."""
        self._end_worker()
        return self

    def close(self) -> None:
        """End the process and its worker."""
        if self._process is not None:
            if self._worker is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._worker, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
            self._worker = None
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        """Start the process, and wait for its first worker."""
        environment = dict(os.environ)
        if self._python != sys.executable:
            environment["PYTHONPATH"] = _links(self._folder.name)
        self._process = subprocess.Popen(
            [self._python, "-m", f"{__package__}.isolated_child", self._asked],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._hello(START_SECONDS)

    def _hello(self, seconds: float) -> None:
        message = self._read(seconds)
        if message is None or "worker" not in message:
            self.close()
            if message is not None and not message["installed"]:
                raise NotInstalledError(message["refused"])
            raise LoadError("subject: its process ended while loading it" if message is None else message["refused"])
        self._worker = message["worker"]

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        if self._process is None:
            self._start()
        sent = [replace(each, arena=Arena()) if hasattr(each, "arena") else each for each in arguments]
        mine = list(storages(sent)) + list(storages(options))
        self._number += 1
        self._write((self._number, method, sent, options, mine, _conditions()))
        seconds = START_SECONDS if method == "describe" else self._timeout
        started = time.monotonic()
        try:
            reply = self._read(seconds)
            while reply is not None and reply.get("number", self._number) != self._number:
                reply = self._read(seconds)  # the answer of another worker to a call that was given up
        except TimeoutError:
            # What was sent may lie half read: nothing that is started from here on may find it.
            self.close()
            raise CallError(ENDS.verdict(False, f"{method}: no result after {seconds:g} s")) from None
        if reply is None or "died" in reply:
            how = _how_it_ended(self._reap() if reply is None else reply["died"])
            if reply is not None:
                self._hello(START_SECONDS)
            passed = time.monotonic() - started
            raise CallError(SURVIVES.verdict(False, f"{method}: the process {how} after {passed:.2g} s"))
        if reply.get("is_over"):
            self._replace_worker()
        if "gone" in reply:
            raise DeviceGoneError(reply["gone"])
        if "violated" in reply:
            raise CallError(PROPERTIES[reply["violated"]].verdict(False, reply["detail"]))
        CHECKED["of an isolated subject"] += reply["launches"]
        result, theirs = reply["result"], reply["storages"]
        for ours, back in zip(mine, theirs, strict=True):
            if not torch.equal(ours.view(torch.uint8), back.view(torch.uint8)):
                ours.copy_(back)
        return _rebound(result, mine, theirs)

    def _write(self, message: Any) -> None:
        if self._process is None or self._process.stdin is None:
            raise RuntimeError("the subject's process has no pipe")
        send(self._process.stdin, message)

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None where the process ended.

        Raises:
            TimeoutError: none came in time.
        """
        if self._process is None or self._process.stdout is None:
            return None
        return receive(self._process.stdout.fileno(), seconds)

    def _end_worker(self) -> None:
        """End the worker, and wait for the next."""
        if self._process is None or self._worker is None:
            return
        os.kill(self._worker, signal.SIGKILL)
        self._replace_worker()

    def _replace_worker(self) -> None:
        """Wait for the worker's end, and for the next; where there is no fork, the next call starts all anew."""
        if self._read(START_SECONDS) is None:
            self.close()
        else:
            self._hello(START_SECONDS)

    def _reap(self) -> int:
        """The exit status of the process, which has ended; the next call starts another."""
        if self._process is None:
            return 0
        status = self._process.wait()
        self.close()
        return status


def _conditions() -> dict[str, bool]:
    """What of this process's state a call depends on."""
    poisoned = torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    backwards = False
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        from . import interpreter

        backwards = interpreter.is_reversed()
    return {"poisoned": poisoned, "backwards": backwards}


def _how_it_ended(status: int) -> str:
    return f"died by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"


def _rebound(result: Any, mine: list[Tensor], theirs: list[Tensor]) -> Any:
    """The result, whose tensors share memory with ours where they shared it with the operands there."""
    if isinstance(result, (list, tuple)):
        return type(result)(_rebound(each, mine, theirs) for each in result)
    if not isinstance(result, Tensor) or not result.untyped_storage().nbytes():
        return result
    for ours, back in zip(mine, theirs, strict=True):
        if back.data_ptr() == result.untyped_storage().data_ptr():
            whole = torch.tensor([], dtype=result.dtype, device=ours.device).set_(ours.untyped_storage())
            return whole.as_strided(result.shape, result.stride(), result.storage_offset())
    return result


def send(pipe: Any, message: Any) -> None:
    """Write a message with its length before it."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    data = buffer.getvalue()
    try:
        pipe.write(HEADER.pack(len(data)))
        pipe.write(data)
        pipe.flush()
    except BrokenPipeError:
        pass  # whoever reads next is told that the process ended


def warm_up() -> None:
    """Import whatever a first call imports, so that no worker does it within that call's time."""
    with poisoned_allocations():
        torch.empty(1)
    buffer = io.BytesIO()
    send(buffer, {"tensor": torch.zeros(1)})
    buffer.seek(HEADER.size)
    torch.load(buffer, weights_only=False)


def receive(descriptor: int, seconds: float | None) -> Any:
    """Read a message; None where the other end is closed.

    Raises:
        TimeoutError: it is not there in time.
    """
    end = None if seconds is None else time.monotonic() + seconds

    def read(count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            left = None if end is None else end - time.monotonic()
            if left is not None and (left <= 0 or not select.select([descriptor], [], [], left)[0]):
                raise TimeoutError
            part = os.read(descriptor, min(count - len(data), 1 << 20))
            if not part:
                return None
            data += part
        return bytes(data)

    header = read(HEADER.size)
    data = None if header is None else read(HEADER.unpack(header)[0])
    # The other end is our own child, which runs what the user asked to run.
    return None if data is None else torch.load(io.BytesIO(data), weights_only=False)


def _links(folder: str) -> str:
    """A folder from which another Python imports this moegate, and nothing else that is installed here."""
    import moegate

    package = Path(folder, "moegate")
    package.mkdir(exist_ok=True)
    here = Path(moegate.__path__[0]).resolve()
    rooms = (Path(__file__).resolve().parents[1] / room for room in ("reference", "impl", "conformance"))
    for source in (*here.glob("*.py"), *rooms):
        link = package / source.name
        if not link.exists():
            link.symlink_to(source)
    return folder
