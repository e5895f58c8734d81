"""The soak: random cases batch by batch until a test's share of the time is over, with memory and handles watched.

Each new failure is shrunk by Hypothesis, which keeps it in its example database, and written once as a spec that can be
replayed: one file for each property and spec in `.moegate/soak`. The run's facts name the specs too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

from .selection import Selection

FOLDER = Path(".moegate", "soak")
SCHEMA = "moegate-soak-failure/1"
# Cases a batch: between two of them usage is looked at, and the time.
BATCH = 25
# Fewer batches are all warm-up: kernels are compiled, caches fill.
FEWEST_BATCHES = 12
# The fact that counts kernels which were compiled, each once a process.
COMPILED = "kernels compiled by all workers"


class GrowthError(AssertionError):
    """Memory or handles that grow with the number of cases."""


@dataclass(frozen=True)
class Usage:
    """What this process holds.

    Attributes:
        memory: resident bytes.
        handles: open files, pipes and sockets.
        device_memory: bytes of torch's tensors on the GPU.
    """

    memory: int
    handles: int
    device_memory: int

    @staticmethod
    def now() -> Usage:
        """Of this moment; 0 where the system does not say."""
        import torch

        on_device = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return Usage(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), on_device)
        except OSError:
            return Usage(0, 0, on_device)


# What may be more at the end than in the middle: an allocator's arenas, a cache of kernels.
ALLOWED = Usage(memory=32 << 20, handles=3, device_memory=8 << 20)


def growth(samples: Sequence[Usage]) -> str:
    """What grew from the middle third of the batches to the last, in words; empty where nothing did.

    The first third is warm-up. Growth is a last third that lies above all of the middle one, by more than is allowed.
    """
    if len(samples) < FEWEST_BATCHES:
        return ""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[-third:]
    grown = []
    for number, field in enumerate(fields(Usage)):
        before, after = ([astuple(each)[number] for each in part] for part in (middle, last))
        more = statistics.median(after) - statistics.median(before)
        if more > getattr(ALLOWED, field.name) and min(after) > max(before):
            grown.append(f"{field.name} from {statistics.median(before):.0f} to {statistics.median(after):.0f}")
    return ", ".join(grown)


def without_compilers(samples: Sequence[Usage], compiled: Sequence[int]) -> list[Usage]:
    """The samples without what memory rose by in batches that compiled a kernel.

    A compiler keeps what its first kernels made it set up: 40 MiB for a process's first, 11 each for its first two big
    ones, then next to nothing. Most kernels are compiled before the soak or early in it, but a rare one can be a
    process's first at any time.

    Args:
        samples: after each batch.
        compiled: how many kernels the process had compiled by then.
    """
    kept = [*samples[:1]]
    for (before, after), (old, new) in zip(pairwise(samples), pairwise(compiled), strict=True):
        rise = after.memory - before.memory
        kept.append(replace(after, memory=kept[-1].memory + (min(rise, 0) if new > old else rise)))
    return kept


def soak(batch: Callable[[], None], selection: Selection, facts: Counter[str]) -> None:
    """Run batches until this test's part of the time is over: what is left, shared by the tests that are left.

    Args:
        batch: runs some cases; raises what it finds.
        selection: says until when, and how many tests wait; this one is counted off.
        facts: counts what was done, and tests for which no time was left.

    Raises:
        GrowthError: memory or handles grew.
    """
    samples: list[Usage] = []
    compiled: list[int] = []
    now, until = time.monotonic(), selection.until or 0.0
    part = now + (until - now) / max(1, selection.waiting)
    selection.waiting -= 1
    if now >= until:
        facts["soak: tests for which no time was left"] += 1
        return
    disabled = logging.root.manager.disable
    # pytest keeps what is logged until the test is over, which here is no end of warnings.
    logging.disable(max(disabled, logging.WARNING))
    try:
        while not samples or time.monotonic() < part:
            batch()
            samples.append(Usage.now())
            compiled.append(facts[COMPILED])
    except BaseException as error:
        for kind, spec, text in _findings(error):
            facts["soak: new failures"] += keep_failure(kind, spec, text)
            # A report shows one case of a property; of a soak on another machine it is all that comes back.
            facts[f"soak: failed: {spec}"] += 1
        raise
    finally:
        logging.disable(disabled)
        facts[f"soak: batches of {BATCH} cases"] += len(samples)
    facts["soak: tests long enough to see growth"] += len(samples) >= FEWEST_BATCHES
    grown = growth(without_compilers(samples, compiled))
    if grown:
        raise GrowthError(f"over {len(samples)} batches of {BATCH} cases: {grown}")


def _findings(error: BaseException) -> Iterator[tuple[str, str, str]]:
    """Class, spec and text of each finding, also of several that Hypothesis raises together."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _findings(each)
    elif hasattr(error, "moegate_spec"):
        yield type(error).__name__, error.moegate_spec, str(error)


def keep_failure(kind: str, spec: str, text: str, folder: Path = FOLDER) -> bool:
    """Write a failure, unless it is there; whether it is new."""
    name = hashlib.sha256(f"{kind} {spec}".encode()).hexdigest()[:16]
    file = folder / f"{name}.json"
    if file.exists():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.{os.getpid()}.part"
    with part.open("w", encoding="utf-8") as stream:
        json.dump({"schema": SCHEMA, "finding": kind, "spec": spec, "text": text}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)
    return True
