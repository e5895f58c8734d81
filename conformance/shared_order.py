"""SHARED, the decision: when a layer's shared experts run, its whole question space, and what must hold on each point.

The space is finite, so it is enumerated, not sampled. The rules stand here a second time, written from their
description and not from any implementation. Orders and tests have these names:

    none                      absent        no shared experts
    no_overlap                unsafe        something forbids an overlap
    mk_internal_overlapped    dispatch      dispatch and combine run the shared experts themselves
    multi_stream_overlapped   multi_stream  CUDA-alike, an auxiliary stream, and at most as many tokens as the threshold
    external                  external      external experts are used
    no_overlap                serial        nothing else holds
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Protocol

from .judge import Property, declare
from .oracle import Count, Enumeration
from .spec import Spec

CUDA_ALIKE = ("cuda:8.0", "cuda:9.0", "rocm:gfx942")
PLATFORMS = (*CUDA_ALIKE, "xpu", "cpu", "out_of_tree")
ORDER_OF_TEST = {
    "absent": "none",
    "unsafe": "no_overlap",
    "dispatch": "mk_internal_overlapped",
    "multi_stream": "multi_stream_overlapped",
    "external": "external",
    "serial": "no_overlap",
}
TESTS = tuple(ORDER_OF_TEST)
ALL_TO_ALLS = (None, "allgather_reducescatter", "deepep_low_latency", "flashinfer_nvlink_two_sided")
SAFE_BESIDE_EPLB = ("allgather_reducescatter",)
DEFAULT_THRESHOLD = 2048
THRESHOLDS = (None, "0", "64")
SWITCHES = (None, "0", "1")
UNREADABLE = {"threshold": ("-1", "1.5", "many"), "switch": ("2", "maybe")}


@dataclass(frozen=True)
class SharedOrderSpec(Spec):
    """One question, in plain words.

    Attributes:
        platform: of `PLATFORMS`.
        shared: the layer has shared experts.
        eplb: experts are rebalanced while the model runs.
        all_to_all: how tokens reach the experts of other ranks; None where they do not.
        sharded_lora: LoRA is fully sharded.
        dispatch: dispatch and combine run the shared experts.
        external: external experts are used.
        stream: the device has an auxiliary stream.
        tokens: M.
        threshold, switch: the environment's two variables; None where they are not set.
    """

    facet: ClassVar[str] = "shared_order"
    is_covered: ClassVar[bool] = False

    platform: str = "cuda:9.0"
    shared: bool = True
    eplb: bool = False
    all_to_all: str | None = None
    sharded_lora: bool = False
    dispatch: bool = False
    external: bool = False
    stream: bool = True
    tokens: int = 1
    threshold: str | None = None
    switch: str | None = None

    @property
    def most_tokens(self) -> int:
        """The threshold's value."""
        return DEFAULT_THRESHOLD if self.threshold is None else int(self.threshold)

    @property
    def is_readable(self) -> bool:
        """Whether both variables hold a value that they may have."""
        return self.threshold not in UNREADABLE["threshold"] and self.switch not in UNREADABLE["switch"]


@dataclass(frozen=True)
class OrderAnswer:
    """An answer, in plain words.

    Attributes:
        order: by its name above; None where the question was refused.
        reasons: (test, taken, causes, why) for each test asked, in the order asked; the last one decided.
        refusal: the message of a refusal.
        crash: the message of any other error.
    """

    order: str | None = None
    reasons: tuple[tuple[str, bool, tuple[str, ...], str], ...] = ()
    refusal: str | None = None
    crash: str | None = None

    @property
    def decided_by(self) -> str | None:
        """The test that decided."""
        return next((test for test, taken, *_ in self.reasons if taken), None)

    def causes_of(self, test: str) -> frozenset[str] | None:
        """What a test named; None where it was not asked."""
        return next((frozenset(causes) for name, _, causes, _ in self.reasons if name == test), None)


class SharedOrderFacet(Protocol):
    """What a subject's `shared_order()` gives."""

    def ask(self, question: SharedOrderSpec, *, nuisance: int = 0) -> OrderAnswer:
        """The answer; `nuisance` varies what may not matter (the device's name, its size)."""
        ...


# --- the rules, a second time ------------------------------------------------------------------------------------


def dangers(question: SharedOrderSpec) -> frozenset[str]:
    """What forbids an overlap, by the names of its causes."""
    found = set()
    if question.eplb and question.all_to_all is not None and question.all_to_all not in SAFE_BESIDE_EPLB:
        found.add("eplb_all_to_all")
    if question.all_to_all == "flashinfer_nvlink_two_sided":
        found.add("two_sided_nvlink")
    if question.sharded_lora:
        found.add("fully_sharded_lora")
    return frozenset(found)


def lacks_for_streams(question: SharedOrderSpec) -> frozenset[str]:
    """What a second stream lacks, by the names of its causes."""
    lacking = set()
    if question.platform not in CUDA_ALIKE:
        lacking.add("platform")
    if not question.stream or question.switch == "1":
        lacking.add("stream")
    if question.tokens > question.most_tokens:
        lacking.add("tokens")
    return frozenset(lacking)


def holds(question: SharedOrderSpec, test: str) -> bool:
    """Whether one test holds, whatever comes before it."""
    return {
        "absent": lambda: not question.shared,
        "unsafe": lambda: bool(dangers(question)),
        "dispatch": lambda: question.dispatch,
        "multi_stream": lambda: not lacks_for_streams(question),
        "external": lambda: question.external,
        "serial": lambda: True,
    }[test]()


def expected_test(question: SharedOrderSpec) -> str:
    """The first test that holds."""
    return next(test for test in TESTS if holds(question, test))


# --- the properties ----------------------------------------------------------------------------------------------

FACET = "shared_order"
TOTAL = declare(
    "SHARED-01", "every question gets an order; an unreadable variable is an error that names it and its value", FACET
)
ABSENT = declare("SHARED-02", "the order is none exactly where a layer has no shared experts", FACET)
UNSAFE = declare(
    "SHARED-03", "nothing overlaps beside EPLB over an undeclared all-to-all, two-sided NVLink, sharded LoRA", FACET
)
DANGERS = declare("SHARED-04", "the safety test holds for its own reasons, and names each of them that is there", FACET)
DISPATCH = declare(
    "SHARED-05", "where it is safe and dispatch and combine run the shared experts, no stream of ours does", FACET
)
BEFORE_EXTERNAL = declare(
    "SHARED-06",
    "tensor parallelism alone, external experts, an auxiliary stream, M within the threshold: they overlap (38990)",
    FACET,
)
STREAMS = declare(
    "SHARED-07",
    "a second stream is taken where it is there, on CUDA alike, for M up to the threshold; else it says what lacks",
    FACET,
)
EXTERNAL = declare(
    "SHARED-08", "external experts run first where they are used and nothing before them holds, and only there", FACET
)
REASONS = declare(
    "SHARED-09", "the tests asked are reported in their order, each with words, and the last alone decides", FACET
)
FIRST = declare("SHARED-10", "the first test that holds decides", FACET)
SWITCH = declare("SHARED-11", "the environment's switch takes the auxiliary stream away, and does nothing else", FACET)
STATELESS = declare(
    "SHARED-12", "the same question gets the same answer, whatever was asked before and the device is called", FACET
)

# A judgement says None where it does not apply, "" where the property holds, and the violation otherwise.
Judgement = Callable[[SharedOrderSpec, OrderAnswer], str | None]


def _total(question: SharedOrderSpec, answer: OrderAnswer) -> str | None:
    if answer.crash is not None:
        return f"error without an answer: {answer.crash}"
    if question.is_readable:
        return "" if answer.order in ORDER_OF_TEST.values() else f"no order but {answer.order}: {answer.refusal}"
    if answer.refusal is None:
        return f"an unreadable variable gave {answer.order}"
    bad = [
        (word, value)
        for word, value in (("THRESHOLD", question.threshold), ("DISABLE", question.switch))
        if value in UNREADABLE["threshold" if word == "THRESHOLD" else "switch"]
    ]
    named = any(word in answer.refusal and str(value) in answer.refusal for word, value in bad)
    return "" if named else f"the error names neither variable nor value: {answer.refusal}"


def _absent(question: SharedOrderSpec, answer: OrderAnswer) -> str | None:
    return "" if (answer.order == "none") != question.shared else f"shared={question.shared}: {answer.order}"


def _unsafe(question: SharedOrderSpec, answer: OrderAnswer) -> str | None:
    if not question.shared or not dangers(question):
        return None
    return "" if answer.order == "no_overlap" else f"{answer.order} beside {sorted(dangers(question))}"


def _dangers(question: SharedOrderSpec, answer: OrderAnswer) -> str | None:
    if not question.shared:
        return None
    expected = dangers(question)
    if not expected:
        return "" if answer.decided_by != "unsafe" else f"unsafe without a danger: {answer.reasons}"
    named = answer.causes_of("unsafe")
    ok = answer.decided_by == "unsafe" and named == expected
    return "" if ok else f"expected unsafe for {sorted(expected)}, got {answer.decided_by} for {sorted(named or ())}"


def _dispatch(question: SharedOrderSpec, answer: OrderAnswer) -> str | None:
    if not question.shared or dangers(question):
        return None
    ok = (answer.order == "mk_internal_overlapped") == question.dispatch
    return "" if ok else f"dispatch={question.dispatch}: {answer.order}"


def _before_external(question: SharedOrderSpec, answer: OrderAnswer) -> str | None:
    alone = not (question.eplb or question.all_to_all or question.sharded_lora or question.dispatch)
    if not (question.shared and alone and question.external) or lacks_for_streams(question):
        return None
    return "" if answer.order == "multi_stream_overlapped" else f"the overlap was lost to {answer.order}"


def _streams(question: SharedOrderSpec, answer: OrderAnswer) -> str | None:
    if not question.shared or dangers(question) or question.dispatch:
        return None
    lacking = lacks_for_streams(question)
    if (answer.order == "multi_stream_overlapped") == bool(lacking):
        return f"{answer.order}, lacking {sorted(lacking)}"
    named = answer.causes_of("multi_stream")
    if lacking and named != lacking:
        return f"expected what lacks to be {sorted(lacking)}, got {None if named is None else sorted(named)}"
    return ""


def _external(question: SharedOrderSpec, answer: OrderAnswer) -> str | None:
    expected = expected_test(question) == "external"
    return "" if (answer.order == "external") == expected else f"expected external: {expected}, got {answer.order}"


def _reasons(question: SharedOrderSpec, answer: OrderAnswer) -> str | None:
    del question
    asked = [test for test, *_ in answer.reasons]
    if not asked or asked != [test for test in TESTS if test in asked]:
        return f"expected tests in the order {TESTS}, got {asked}"
    if [taken for _, taken, *_ in answer.reasons] != [False] * (len(asked) - 1) + [True]:
        return f"expected the last test alone to decide, got {answer.reasons}"
    without = [test for test, _, causes, why in answer.reasons if not causes or not why]
    if without:
        return f"no words or no cause for {without}"
    last = asked[-1]
    return "" if ORDER_OF_TEST[last] == answer.order else f"{last} decided on {answer.order}"


def _first(question: SharedOrderSpec, answer: OrderAnswer) -> str | None:
    expected = expected_test(question)
    skipped = [test for test in TESTS[: TESTS.index(expected)] if answer.causes_of(test) is None]
    if answer.decided_by != expected or answer.order != ORDER_OF_TEST[expected]:
        return f"expected {expected}: {ORDER_OF_TEST[expected]}, got {answer.decided_by}: {answer.order}"
    return "" if not skipped else f"{skipped} were not asked before {expected}"


JUDGEMENTS: tuple[tuple[Property, Judgement], ...] = (
    (ABSENT, _absent),
    (UNSAFE, _unsafe),
    (DANGERS, _dangers),
    (DISPATCH, _dispatch),
    (BEFORE_EXTERNAL, _before_external),
    (STREAMS, _streams),
    (EXTERNAL, _external),
    (REASONS, _reasons),
    (FIRST, _first),
)


def judge_order(question: SharedOrderSpec, answer: OrderAnswer) -> list[tuple[Property, str]]:
    """Every judgement of one answer that applies: the property, and the violation or an empty string."""
    total = _total(question, answer) or ""
    if total or not question.is_readable:
        return [(TOTAL, total)]
    found = ((prop, judgement(question, answer)) for prop, judgement in JUDGEMENTS)
    return [(TOTAL, ""), *((prop, violation) for prop, violation in found if violation is not None)]


def judge_relations(
    facet: SharedOrderFacet, question: SharedOrderSpec, answer: OrderAnswer
) -> list[tuple[Property, str]]:
    """What relates the answer to those of neighbouring questions."""
    if not question.is_readable:
        return []
    verdicts = []
    for nuisance in (0, 1, 2):
        other = facet.ask(question, nuisance=nuisance)
        verdicts.append((STATELESS, "" if other == answer else f"{answer} became {other}"))
    off = facet.ask(replace(question, switch="1"))
    without = facet.ask(replace(question, stream=False, switch=None))
    same = (off.order, off.decided_by) == (without.order, without.decided_by)
    verdicts.append((SWITCH, "" if same else f"switched off {off.order}, without a stream {without.order}"))
    return verdicts


# --- the space ---------------------------------------------------------------------------------------------------


def orders() -> Iterator[SharedOrderSpec]:
    """Every question, with tokens on both sides of every threshold."""
    flags = (False, True)
    for threshold in THRESHOLDS:
        edge = SharedOrderSpec(threshold=threshold).most_tokens
        counts = sorted({0, 1, max(edge - 1, 0), edge, edge + 1, 8192})
        for platform, all_to_all, switch, tokens in product(PLATFORMS, ALL_TO_ALLS, SWITCHES, counts):
            for shared, eplb, lora, dispatch, external, stream in product(flags, repeat=6):
                yield SharedOrderSpec(
                    platform, shared, eplb, all_to_all, lora, dispatch, external, stream, tokens, threshold, switch
                )


def unreadable() -> Iterator[SharedOrderSpec]:
    """Questions in an environment that says nothing."""
    for platform in PLATFORMS:
        for threshold in UNREADABLE["threshold"]:
            yield SharedOrderSpec(platform, threshold=threshold)
        for switch in UNREADABLE["switch"]:
            yield SharedOrderSpec(platform, switch=switch)


def enumerate_orders(
    facet: SharedOrderFacet, questions: Iterable[SharedOrderSpec], *, relations_every: int = 0
) -> Enumeration:
    """Ask every question and judge every answer; relate every n-th one to its neighbours (0: none)."""
    result = Enumeration()
    for index, question in enumerate(questions):
        answer = facet.ask(question)
        verdicts = judge_order(question, answer)
        if relations_every and index % relations_every == 0:
            verdicts += judge_relations(facet, question, answer)
        for prop, violation in verdicts:
            result.counts.setdefault(prop, Count()).add(violation, question)
        result.points += 1
        result.decisions[answer.order or "refused"] += 1
    return result
