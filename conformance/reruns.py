"""The same calls again and again: a fixed set of cases whose results must not change by a bit.

Races that show once in a thousand calls change no average, and two calls side by side (HYGIENE-04) rarely meet one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from .coverage import once, pinned_experts, pinned_slabs
from .judge import Verdict
from .properties.hygiene import SAME_BITS, poisoned_allocations
from .properties.shared import differing_bytes
from .selection import SELECTION
from .session import other_order
from .spec import Spec
from .strategies import pinned_routings
from .subject import Capabilities

# Of a run that was not asked for more, so that every subject is judged: every so manyth case, and so often.
FEW, EACH = 3, 6
# Cases of each kind, which between them have every declared feature.
CASES = {"experts": 24, "batched": 8, "route": 8}


def reruns_asked() -> int:
    """How often each case is called again in this run."""
    return FEW if SELECTION.reruns is None else SELECTION.reruns


def fixed_cases(facet: str, device: str, capabilities: Capabilities) -> tuple[Spec, ...]:
    """The cases of a facet on a device: the same in each run and for each subject of the same capabilities.

    A run that was not asked for reruns gets a few of them.
    """
    if facet == "experts":
        # A batch without a token has nothing that could differ.
        specs: Sequence[Spec] = [spec for spec in once(pinned_experts(device, capabilities)) if spec.M]
    elif facet == "batched":
        specs = [spec for spec in once(pinned_slabs(device, capabilities)) if spec.counts != "zero"]
    else:
        specs = pinned_routings(device, capabilities)
    chosen = _most_different(specs, CASES[facet])
    return chosen if SELECTION.reruns is not None else chosen[::EACH]


def _most_different(specs: Sequence[Spec], count: int) -> tuple[Spec, ...]:
    """Each the one with most features that no other has yet; once all features are there, they are wanted again."""
    left, chosen, missing = list(specs), [], set()
    while left and len(chosen) < count:
        if not missing:
            missing = {feature for spec in left for feature in vars(spec).items() if feature[0] not in Spec.SIZES}
        best = max(left, key=lambda spec: len(missing & set(vars(spec).items())))
        left.remove(best)
        chosen.append(best)
        missing -= set(vars(best).items())
    return tuple(chosen)


def judge_reruns(run: Callable[[], tuple[Tensor, ...]], times: int, facts: Counter[str]) -> Verdict:
    """HYGIENE-08 on one case.

    Args:
        run: makes the call, and gives its tensors.
        times: how often it is made again.
        facts: counts the calls that were compared, and those that differed.
    """
    first = tuple(tensor.clone() for tensor in run())
    differing, detail = 0, ""
    for number in range(1, times + 1):
        # What memory held and in which order programs run may not matter, so every other call has another.
        with poisoned_allocations(number % 2 == 1), other_order() if number % 2 else nullcontext():
            again = run()
        if not any(map(differing_bytes, first, again)):
            continue
        differing += 1
        detail = detail or f"call {number + 1}: {_difference(first, again)}"
    facts["reruns: calls compared"] += times
    facts["reruns: calls that differed"] += differing
    return SAME_BITS.verdict(not differing, f"{differing} of {times} calls differ from the first; {detail}")


def _difference(first: tuple[Tensor, ...], again: tuple[Tensor, ...]) -> str:
    for before, now in zip(first, again, strict=True):
        if before.shape != now.shape or before.dtype != now.dtype:
            return f"{list(now.shape)} {now.dtype}, the first {list(before.shape)} {before.dtype}"
        if differing_bytes(before, now):
            # Equal numbers may differ in bits (zeros), and equal bits be no equal numbers (NaN).
            theirs, ours = (tensor.contiguous().view(torch.uint8) for tensor in (before, now))
            differs = (theirs != ours).view(-1, before.element_size()).any(1)
            place = int(differs.int().argmax())
            was, got = before.flatten()[place], now.flatten()[place]
            return f"{int(differs.sum())} of {before.numel()} elements, first element {place}: {was}, now {got}"
    return ""
