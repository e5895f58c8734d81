"""What a process of `real_ranks` does with a spec: its part of the case, by the subject's name."""

from __future__ import annotations

from functools import cache
from typing import Any

from .loading import load_subject
from .parallel_cases import build_parallel
from .properties.ep import RankResult
from .properties.hygiene import poisoned_allocations
from .spec import parse_spec
from .subject import Subject

_subject = cache(load_subject)


def run_case(
    links: Any, subject: str, variant: str, line: str, device: str, fails: tuple[int, str] | None
) -> RankResult:
    """One rank's part; tensors come back to the CPU."""
    loaded: Subject = _subject(subject)
    case = build_parallel(parse_spec(line), device)
    with poisoned_allocations():
        result = loaded.parallel(case, links, variant, fails=fails)
    written = case.changed()
    if written:
        raise RuntimeError(f"operands were written: {written}")
    return result.on_cpu()
