"""HYGIENE: what a call leaves behind, and what its result may not depend on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..arena import Arena
from ..cases import ExpertsCase
from ..judge import Verdict, declare
from ..numerics import Numerics

FORM = declare(
    "HYGIENE-01", "the result is [M, H] in the dtype and on the device of hidden_states, also for M = 0", "experts"
)
INPUTS = declare("HYGIENE-02", "no input, nor the memory around it, is written", "experts")
ALIAS = declare("HYGIENE-03", "the result shares no memory with an input", "experts")
REPEATABLE = declare(
    "HYGIENE-04",
    "the same call gives the same bits, whatever uninitialised memory held and in whatever order programs ran",
    "experts",
    repeatable=True,
)
SAME_BITS = declare(
    "HYGIENE-08", "a call that is made many times gives the same bits every time", "experts", repeatable=True
)
APART = declare(
    "HYGIENE-07", "the results of two calls share no memory: a later call leaves an earlier result alone", "experts"
)
ROUTE_INPUTS = declare("HYGIENE-05", "routing writes neither its logits nor the memory around them", "route")
ALIGN_INPUTS = declare("HYGIENE-06", "alignment writes neither its ids nor the memory around them", "align")


def _use_deterministic_algorithms(enabled: bool, *, warn_only: bool) -> None:
    """PyTorch's switch; its usual name also tells the compiler, and loads it for that: a second in each process."""
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    else:
        torch.set_deterministic_debug_mode(("warn" if warn_only else "error") if enabled else "default")


@contextmanager
def poisoned_allocations(enabled: bool = True) -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, or the largest integer: PyTorch's own switch, for any subject."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    _use_deterministic_algorithms(enabled, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = enabled
    try:
        yield
    finally:
        _use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def judge_form(case: ExpertsCase, output: Tensor) -> Verdict:
    """HYGIENE-01."""
    x = case.hidden_states
    return FORM.verdict(
        isinstance(output, Tensor)
        and output.shape == x.shape
        and output.dtype == x.dtype
        and output.device == x.device,
        f"expected {list(x.shape)} {x.dtype} on {x.device}, got "
        + (f"{list(output.shape)} {output.dtype} on {output.device}" if isinstance(output, Tensor) else repr(output)),
    )


def judge_hygiene(case: ExpertsCase, output: Tensor, again: Tensor | None, numerics: Numerics) -> list[Verdict]:
    """HYGIENE-02 to 04 and 07; `again` is the output of a second call, made without poisoned allocations."""
    changed = case.arena.changed()
    storage = output.untyped_storage().data_ptr() if output.numel() else None
    inputs = {name: t.untyped_storage().data_ptr() for name, t in case.tensors().items() if t.numel()}
    shared = [name for name, pointer in inputs.items() if pointer == storage]
    verdicts = [
        INPUTS.verdict(not changed, f"written: {changed}"),
        ALIAS.verdict(not shared, f"shared with {shared}"),
    ]
    if again is not None and output.numel():
        verdicts.append(APART.verdict(again.untyped_storage().data_ptr() != storage, "both lie in the same memory"))
    if again is not None and numerics.repeatable:
        differs = (
            output.view(torch.uint8) != again.view(torch.uint8) if output.numel() else torch.zeros(1, dtype=torch.bool)
        )
        verdicts.append(REPEATABLE.verdict(not differs.any(), f"{int(differs.sum())} bytes differ between two calls"))
    return verdicts


def judge_inputs(arena: Arena, facet: str) -> Verdict:
    """HYGIENE-05 and 06."""
    changed = arena.changed()
    return (ROUTE_INPUTS if facet == "route" else ALIGN_INPUTS).verdict(not changed, f"written: {changed}")
