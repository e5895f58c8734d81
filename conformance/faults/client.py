"""Start the server, hand it jobs, and give outcomes as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import IO

from .job import Job, Outcome, job_as_line


class HuntError(RuntimeError):
    """The server ended before it had done its work."""


def outcomes_of(jobs: Sequence[Job], processes: int) -> Iterator[Outcome]:
    """Hunt faults in children of a server, which is started in the Triton mode of the jobs' device.

    Args:
        jobs: of one device.
        processes: children at a time.

    Raises:
        HuntError: the server ended early.
    """
    if not jobs:
        return
    device = jobs[0].orders.device
    environment = dict(os.environ, TRITON_INTERPRET="1" if device == "cpu" else "0", OMP_NUM_THREADS="1")
    settings = {
        "packages": sorted({job.fault.package for job in jobs}),
        "subjects": sorted({job.fault.subject for job in jobs}),
        "device": device,
        "processes": processes,
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moegate.conformance.faults.server"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stdin, stdout, stderr = server.stdin, server.stdout, server.stderr
    if stdin is None or stdout is None or stderr is None:
        raise HuntError("expected pipes to the server")
    writer = threading.Thread(target=_write, args=(stdin, settings, jobs), daemon=True)
    writer.start()
    complaints: list[str] = []
    reader = threading.Thread(target=lambda: complaints.append(stderr.read()), daemon=True)
    reader.start()
    try:
        done = 0
        for line in stdout:
            done += 1
            yield Outcome.from_dict(json.loads(line))
        server.wait()
        reader.join()
        if done != len(jobs):
            raise HuntError(f"the server ended after {done} of {len(jobs)} faults: {complaints[0][-2000:]}")
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait()


def _write(stdin: IO[str], settings: dict[str, object], jobs: Sequence[Job]) -> None:
    try:
        stdin.write(json.dumps(settings) + "\n")
        stdin.writelines(job_as_line(job) + "\n" for job in jobs)
        stdin.close()
    except BrokenPipeError:
        pass  # it has ended, which is seen where it is read
