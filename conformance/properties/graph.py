"""GRAPH: a call captured once in a CUDA graph and replayed on other operands gives what an eager call gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..judge import Property, Verdict, declare
from ..numerics import Numerics
from ..shared_cases import SharedCase, first_tokens
from .shared import differing_bytes, judge_element, truth_of

_FACETS = ("capture", "shared")
FIRST = declare(
    "GRAPH-01", "a replay writes its whole output, with the bits of an eager call", *_FACETS, devices=("cuda",)
)
IN_PLACE = declare(
    "GRAPH-02",
    "hidden states, routing weights and ids that were changed in place give a replay the bits of fresh ones",
    *_FACETS,
    devices=("cuda",),
)
PADDED = declare(
    "GRAPH-03",
    "fewer tokens than were captured have the bits of an eager call on the padded batch, whatever the padding holds",
    *_FACETS,
    devices=("cuda",),
)
TOKENS = declare(
    "GRAPH-04",
    "fewer tokens than were captured are within the budget of the float64 reference of these tokens alone",
    *_FACETS,
    is_value=True,
    devices=("cuda",),
)
WEIGHTS = declare(
    "GRAPH-05",
    "weights that were changed in place are read by a replay as an eager call reads them",
    *_FACETS,
    devices=("cuda",),
)
APART = declare(
    "GRAPH-06",
    "a replay writes no operand, and gives the same bits again after an eager call",
    *_FACETS,
    devices=("cuda",),
)
STREAMS = declare(
    "GRAPH-07", "graphs of two layers, in turn on two streams, keep their bits", *_FACETS, devices=("cuda",)
)
EAGER = declare("GRAPH-08", "operands that were changed in place give an eager call the bits of fresh ones", *_FACETS)


class Graph(Protocol):
    """A captured call; each replay writes `output` anew."""

    output: Tensor

    def replay(self) -> None:
        """Enqueue it on the current stream."""
        ...


class CudaGraph:
    """`torch.cuda.CUDAGraph` of one call, which has run before.

    It is captured on a stream of its own: what a library keeps for each stream (a workspace of cuBLAS) is then no
    other graph's.
    """

    def __init__(self, call: Callable[[], Tensor]) -> None:
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.Stream()):
            self.output = call()

    def replay(self) -> None:
        """Enqueue it on the current stream."""
        self._graph.replay()


@dataclass(frozen=True)
class Calls:
    """How a subject is called.

    Attributes:
        prepare: a case to a call that reads its operands where they lie (`Subject.capture`).
        eager: a case to its output, by a call that is made for it.
        record: captures a call that has run before.
    """

    prepare: Callable[[SharedCase], Callable[[], Tensor]]
    eager: Callable[[SharedCase], Tensor]
    record: Callable[[Callable[[], Tensor]], Graph] = CudaGraph

    def captured(self, case: SharedCase) -> tuple[Callable[[], Tensor], Graph]:
        """The prepared call of a case and its graph."""
        call = self.prepare(case)
        call()  # compiles what it launches
        return call, self.record(call)


def replayed(graph: Graph) -> Tensor:
    """A copy of what a replay writes; what it does not write is NaN."""
    graph.output.fill_(torch.nan)
    graph.replay()
    return graph.output.clone()


def contents(case: SharedCase) -> tuple[Tensor, Tensor, Tensor]:
    """The operands that change from call to call."""
    return case.routed.hidden_states, case.routed.topk_weights, case.routed.topk_ids


def write(case: SharedCase, values: Sequence[Tensor]) -> None:
    """Change them in place."""
    for operand, value in zip(contents(case), values, strict=True):
        operand.copy_(value)


def fresh(case: SharedCase, values: Sequence[Tensor]) -> SharedCase:
    """The weights of a case with other contents, in memory that no call has seen."""
    hidden_states, topk_weights, topk_ids = (value.clone() for value in values)
    return replace(
        case,
        routed=replace(case.routed, hidden_states=hidden_states, topk_weights=topk_weights, topk_ids=topk_ids),
        shared=replace(case.shared, hidden_states=hidden_states),
    )


def fresh_weights(case: SharedCase) -> SharedCase:
    """The case with its contents and w2 in memory that no call has seen, under no name that one could have kept."""
    case = fresh(case, contents(case))
    return replace(case, routed=replace(case.routed, w2=case.routed.w2.clone()))


def judge_replays(case: SharedCase, donors: Sequence[SharedCase], calls: Calls) -> list[Verdict]:
    """GRAPH-01, 02, 05 and 06; the case is changed.

    Args:
        case: what is captured.
        donors: cases of the same sizes, whose contents are written into it.
        calls: of the subject.
    """
    held = [value.clone() for value in contents(case)]
    call, graph = calls.captured(case)
    verdicts = [_same(FIRST, replayed(graph), calls.eager(fresh(case, held)), "the operands that were captured")]
    for number, donor in enumerate(donors):
        write(case, contents(donor))
        found = replayed(graph)
        verdicts.append(_same(IN_PLACE, found, calls.eager(fresh(case, contents(donor))), f"contents {number}"))
        before = {name: operand.clone() for name, operand in case.tensors().items()}
        call()
        again = replayed(graph)
        written = [name for name, operand in case.tensors().items() if differing_bytes(operand, before[name])]
        differs = differing_bytes(found, again)
        verdicts.append(
            APART.verdict(not written and not differs, f"written: {written}; {differs} bytes differ the second time")
        )
    case.routed.w2.neg_()
    verdicts.append(_same(WEIGHTS, replayed(graph), calls.eager(fresh_weights(case)), "a w2 that was negated"))
    return verdicts


def judge_fewer_tokens(
    case: SharedCase, count: int, calls: Calls, numerics: Numerics, *, takes_invalid: bool
) -> list[Verdict]:
    """GRAPH-03 and 04; the case is changed.

    Args:
        case: what is captured, M tokens.
        count: how many are real in the replay.
        calls: of the subject.
        numerics: what it declares.
        takes_invalid: padding may have no expert (ids of -1); its hidden states are then NaN.
    """
    hidden_states, _, ids = contents(case)
    truth = truth_of(first_tokens(case, count), numerics)
    _, graph = calls.captured(case)
    verdicts, first = [], None
    for padding in (torch.nan, 3.0) if takes_invalid else (1.0, 3.0):
        hidden_states[count:] = padding
        ids[count:] = -1 if takes_invalid else ids[:1]
        found = replayed(graph)[:count]
        expected = calls.eager(fresh(case, contents(case)))[:count]
        verdicts.append(_same(PADDED, found, expected, f"{count} of {len(ids)} tokens beside padding of {padding}"))
        verdicts += [replace(verdict, property=TOKENS) for verdict in judge_element(found, truth)]
        if first is not None:
            verdicts.append(_same(PADDED, found, first, f"{count} tokens beside one padding and another"))
        first = found
    return verdicts


def judge_streams(cases: Sequence[SharedCase], calls: Calls, streams: Sequence[torch.cuda.Stream]) -> list[Verdict]:
    """GRAPH-07: each case's graph on a stream of its own, nobody waiting for the other, with contents in turn."""
    held = [[value.clone() for value in contents(case)] for case in cases]
    expected = [[calls.eager(fresh(case, values)) for values in held] for case in cases]
    graphs = [calls.captured(case)[1] for case in cases]
    torch.cuda.synchronize()
    found = []
    for turn in range(6):
        for own, (case, graph, stream) in enumerate(zip(cases, graphs, streams, strict=True)):
            which = (turn + own) % len(cases)
            with torch.cuda.stream(stream):
                write(case, held[which])
                found.append((own, which, replayed(graph)))
    torch.cuda.synchronize()
    return [
        _same(STREAMS, output, expected[own][which], f"layer {own}, contents {which}") for own, which, output in found
    ]


def judge_eager(case: SharedCase, donor: SharedCase, calls: Calls) -> Verdict:
    """GRAPH-08; the case is changed."""
    call = calls.prepare(case)
    call()
    write(case, contents(donor))
    verdict = _same(EAGER, call(), calls.eager(fresh(case, contents(donor))), "contents of another case")
    if not verdict.holds:
        return verdict
    case.routed.w2.neg_()
    return _same(EAGER, call(), calls.eager(fresh_weights(case)), "a w2 that was negated")


def _same(prop: Property, found: Tensor, expected: Tensor, what: str) -> Verdict:
    differs = differing_bytes(found, expected)
    return prop.verdict(not differs, f"{differs} bytes differ with {what}")
