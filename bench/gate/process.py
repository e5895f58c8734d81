"""One side's process as the gate sees it: requests and answers, one JSON line each, over pipes of their own.

Pipes of their own, since what a subject prints must not end up among the answers. A process that dies, hangs or answers
nonsense is an error of that process alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_MOST_OUTPUT = 2000
_GRACE_SECONDS = 5.0


class ProcessError(RuntimeError):
    """A side's process died, hung, or could not do what was asked."""


class SideProcess:
    """A fresh Python process of one side, which serves `worker`.

    It starts at once and imports while the caller goes on. Answers are awaited with `answer`.

    Args:
        side: its name, for messages.
        environment: of the process.
        cwd: its folder.
        arguments: of the worker.
        module: what is run.
    """

    def __init__(
        self,
        side: str,
        environment: Mapping[str, str],
        cwd: Path,
        arguments: tuple[str, ...],
        module: str = "moegate.bench.gate.worker",
    ) -> None:
        self.side = side
        theirs_in, self._requests = os.pipe()
        self._answers, theirs_out = os.pipe()
        command = [sys.executable, "-m", module, str(theirs_in), str(theirs_out), *arguments]
        self._log_reader, log = os.pipe()
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,  # an interrupt is ours to handle
        )
        for handle in (theirs_in, theirs_out, log):
            os.close(handle)
        os.set_blocking(self._answers, False)
        os.set_blocking(self._log_reader, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._answers, selectors.EVENT_READ)
        self._selector.register(self._log_reader, selectors.EVENT_READ)
        self._buffer, self._log = b"", b""
        self._closed = False

    def __enter__(self) -> SideProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, do: str, **arguments: Any) -> None:
        """Ask for something; `answer` waits for it.

        Raises:
            ProcessError: the process is dead.
        """
        line = json.dumps({"do": do, **arguments}).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._requests, line) :]
        except OSError as error:
            raise self._died() from error

    def answer(self, limit: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            ProcessError: the process died, said why it cannot, or took longer than `limit` seconds.
        """
        ends = time.monotonic() + limit
        while b"\n" not in self._buffer:
            left = ends - time.monotonic()
            if left <= 0:
                self.kill()
                raise ProcessError(f"the {self.side}'s process did not answer within {limit:g} s{self._said()}")
            for key, _ in self._selector.select(left):
                self._read(key.fd)
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise ProcessError(f"the {self.side}: {answer['error']}")
        return answer

    def ask(self, do: str, *, limit: float, **arguments: Any) -> dict[str, Any]:
        """Send and wait."""
        self.send(do, **arguments)
        return self.answer(limit)

    def close(self) -> None:
        """End the process, and whatever it started."""
        if self._closed:
            return
        self._closed = True
        os.close(self._requests)  # a worker that is idle ends by itself
        try:
            self._process.wait(_GRACE_SECONDS if self._process.poll() is None and not self._buffer else 0.1)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._selector.close()
        with contextlib.suppress(OSError):
            self._log += os.read(self._log_reader, 1 << 16)
        os.close(self._answers)
        os.close(self._log_reader)

    def kill(self) -> None:
        """End the process now, whatever it does."""
        if not self._closed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self.close()

    def _read(self, handle: int) -> None:
        try:
            data = os.read(handle, 1 << 16)
        except BlockingIOError:
            return
        if handle == self._log_reader:
            self._log = (self._log + data)[-4 * _MOST_OUTPUT :]
            if not data:
                self._selector.unregister(handle)
        elif data:
            self._buffer += data
        else:
            raise self._died()

    def _died(self) -> ProcessError:
        self.close()
        code = self._process.returncode
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return ProcessError(f"the {self.side}'s process {how}{self._said()}")

    def _said(self) -> str:
        text = self._log.decode(errors="replace").strip()[-_MOST_OUTPUT:]
        return f":\n{text}" if text else ""


def serve(requests: int, answers: int, operations: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
    """The process's whole life: one request after the other until the pipe closes."""
    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as out:
        for line in lines:
            arguments = json.loads(line)
            do = arguments.pop("do")
            try:
                answer = dict(operations[do](**arguments))
            except Exception as error:  # whatever an operation raises is its answer
                answer = {"error": f"{type(error).__name__}: {error}"[:_MOST_OUTPUT]}
            out.write(json.dumps(answer) + "\n")
            out.flush()
