"""When a layer's shared experts run: the order, decided by a pure function with a reason for every test.

The tests come in one order, and the first that holds decides. A multi-GPU layer whose experts come from outside once
lost 6 to 8 % of its decode throughput, because that was asked before the second stream was
(https://github.com/vllm-project/vllm/pull/38990); nothing failed. So the order stands here as data, and all that
a test asks about is a value: the environment too is handed in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from .checks import expect_bool, expect_int, switch
from .platform import Platform

THRESHOLD_VARIABLE = "MOEGATE_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD"
SWITCH_VARIABLE = "MOEGATE_DISABLE_SHARED_EXPERTS_STREAM"
DEFAULT_THRESHOLD = 2048
"""M up to which an overlap is taken.

On an H200 no cell of `moegate bench --overlap` (DeepSeek-V3 TP8, Qwen3.5-35B-A3B, Qwen2-57B TP4; M up to this; graph
replays of both orders interleaved, cold weights) ran at less than 1.02 of the speed of one stream. That command prints
the largest M up to which none is under 0.99, which is what belongs here, by GPU.
"""
SOURCE = "https://github.com/vllm-project/vllm/pull/38990"

_NOTHING: Mapping[str, str] = MappingProxyType({})


class SharedExpertsOrder(StrEnum):
    """When the shared experts run, beside the routed ones."""

    NONE = "none"  # there are none
    EXTERNAL = "external"  # before the routed ones, on the caller's stream; their result is reduced over ranks already
    NO_OVERLAP = "no_overlap"  # after the routed ones, on the caller's stream
    MK_INTERNAL_OVERLAPPED = "mk_internal_overlapped"  # dispatch and combine of the experts' kernel run them
    MULTI_STREAM_OVERLAPPED = "multi_stream_overlapped"  # beside the routed ones, on the device's auxiliary stream


class OrderTest(StrEnum):
    """The tests, in the order in which they are asked."""

    ABSENT = "absent"  # no shared experts
    UNSAFE = "unsafe"  # something that must not overlap with them
    DISPATCH = "dispatch"  # dispatch and combine run them
    MULTI_STREAM = "multi_stream"  # a second stream is there and worth it
    EXTERNAL = "external"  # external experts are used
    SERIAL = "serial"  # nothing else holds


# All-to-alls beside which the rebalancing of experts is declared safe, and those of two-sided NVLink communication.
SAFE_BESIDE_EPLB = frozenset({"allgather_reducescatter"})
TWO_SIDED_NVLINK = frozenset({"flashinfer_nvlink_two_sided"})
ALL_TO_ALLS = (
    *sorted(SAFE_BESIDE_EPLB | TWO_SIDED_NVLINK),
    "deepep_high_throughput",
    "deepep_low_latency",
    "flashinfer_nvlink_one_sided",
)


@dataclass(frozen=True)
class SharedExpertsSetting:
    """What surrounds the shared experts of one layer.

    Attributes:
        has_shared_experts: there are any.
        uses_eplb: experts are rebalanced over the ranks while the model runs.
        all_to_all: how tokens travel to other ranks' experts, by a name of `ALL_TO_ALLS`; None where they do not.
        fully_sharded_lora: LoRA adapters are sharded in both of their matrices, and gathered between them.
        dispatch_runs_shared_experts: dispatch and combine of the experts' kernel run the shared ones themselves.
        uses_external_experts: the shared experts are a module from outside that reduces its result over the ranks.

    Raises:
        TypeError, ValueError: a field of another type, or an unknown all-to-all, by name.
    """

    has_shared_experts: bool = True
    uses_eplb: bool = False
    all_to_all: str | None = None
    fully_sharded_lora: bool = False
    dispatch_runs_shared_experts: bool = False
    uses_external_experts: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "all_to_all":
                expect_bool(field.name, getattr(self, field.name))
        if self.all_to_all is not None and self.all_to_all not in ALL_TO_ALLS:
            raise ValueError(f"all_to_all: expected None or one of {list(ALL_TO_ALLS)}, got {self.all_to_all!r}")


@dataclass(frozen=True)
class OrderReason:
    """What one test said.

    Attributes:
        test: which.
        order: what it would decide.
        taken: whether it decided.
        causes: names of what made it hold, or of what it lacked, all of them.
        why: the same in words for the user.
    """

    test: OrderTest
    order: SharedExpertsOrder
    taken: bool
    causes: tuple[str, ...]
    why: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "test": str(self.test),
            "order": str(self.order),
            "taken": self.taken,
            "causes": list(self.causes),
            "why": self.why,
        }


@dataclass(frozen=True)
class OrderDecision:
    """The order, with one reason for each test that was asked: the last one decided.

    Attributes:
        order: when the shared experts run.
        reasons: in the order asked.
    """

    order: SharedExpertsOrder
    reasons: tuple[OrderReason, ...]

    def __str__(self) -> str:
        *passed, taken = self.reasons
        words = "; ".join(f"{reason.test}: {reason.why}" for reason in passed)
        return f"{self.order}: {taken.why}" + (f". Passed over: {words}" if passed else "")


def stream_token_threshold(environment: Mapping[str, str] = _NOTHING) -> int:
    """The most tokens that overlap on a second stream, from the environment's variable where it is set.

    Raises:
        ValueError: no integer of at least 0.
    """
    text = environment.get(THRESHOLD_VARIABLE, "").strip()
    if not text:
        return DEFAULT_THRESHOLD
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"{THRESHOLD_VARIABLE}: expected an integer of at least 0, got {text!a:.80}")
    return int(text)


def is_stream_disabled(environment: Mapping[str, str] = _NOTHING) -> bool:
    """Whether the environment takes the auxiliary stream away.

    Raises:
        ValueError: neither on nor off.
    """
    return switch(SWITCH_VARIABLE, environment)


@dataclass(frozen=True)
class _Question:
    """Everything that a test may ask about."""

    setting: SharedExpertsSetting
    platform: Platform
    has_auxiliary_stream: bool
    is_disabled: bool
    num_tokens: int
    threshold: int


Causes = dict[str, str]
"""By its name, each cause in words."""


def _absent(question: _Question) -> tuple[bool, Causes]:
    if question.setting.has_shared_experts:
        return False, {"shared_experts": "the layer has shared experts"}
    return True, {"no_shared_experts": "the layer has no shared experts"}


def _unsafe(question: _Question) -> tuple[bool, Causes]:
    setting, causes = question.setting, {}
    if setting.uses_eplb and setting.all_to_all is not None and setting.all_to_all not in SAFE_BESIDE_EPLB:
        causes["eplb_all_to_all"] = (
            f"EPLB with the all-to-all {setting.all_to_all}, which is not declared safe beside it"
        )
    if setting.all_to_all in TWO_SIDED_NVLINK:
        causes["two_sided_nvlink"] = f"two-sided NVLink communication ({setting.all_to_all})"
    if setting.fully_sharded_lora:
        causes["fully_sharded_lora"] = "fully sharded LoRA"
    return bool(causes), causes or {"safe": "nothing forbids an overlap"}


def _dispatch(question: _Question) -> tuple[bool, Causes]:
    if question.setting.dispatch_runs_shared_experts:
        return True, {"dispatch": "dispatch and combine run the shared experts themselves"}
    return False, {"no_dispatch": "dispatch and combine do not run the shared experts"}


def _multi_stream(question: _Question) -> tuple[bool, Causes]:
    tokens, threshold = question.num_tokens, question.threshold
    lacking: Causes = {}
    if not question.platform.is_cuda_alike:
        lacking["platform"] = f"{question.platform} has no second stream"
    if not question.has_auxiliary_stream:
        lacking["stream"] = "there is no auxiliary stream"
    elif question.is_disabled:
        lacking["stream"] = f"{SWITCH_VARIABLE} takes the auxiliary stream away"
    if tokens > threshold:
        lacking["tokens"] = f"{tokens} tokens are more than the threshold of {threshold}"
    if lacking:
        return False, lacking
    return True, {
        "stream": f"an auxiliary stream is there, and {tokens} tokens are within the threshold of {threshold}"
    }


def _external(question: _Question) -> tuple[bool, Causes]:
    if question.setting.uses_external_experts:
        return True, {"external_experts": "external experts are used, which reduce their result themselves"}
    return False, {"no_external_experts": "no external experts are used"}


def _serial(question: _Question) -> tuple[bool, Causes]:
    del question
    return True, {"nothing_else": "nothing else holds"}


# The order is the rule: the first test that holds decides.
TESTS: tuple[tuple[OrderTest, SharedExpertsOrder, Callable[[_Question], tuple[bool, Causes]]], ...] = (
    (OrderTest.ABSENT, SharedExpertsOrder.NONE, _absent),
    (OrderTest.UNSAFE, SharedExpertsOrder.NO_OVERLAP, _unsafe),
    (OrderTest.DISPATCH, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED, _dispatch),
    (OrderTest.MULTI_STREAM, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED, _multi_stream),
    (OrderTest.EXTERNAL, SharedExpertsOrder.EXTERNAL, _external),
    (OrderTest.SERIAL, SharedExpertsOrder.NO_OVERLAP, _serial),
)


def shared_experts_order(
    setting: SharedExpertsSetting,
    platform: Platform,
    *,
    has_auxiliary_stream: bool,
    num_tokens: int,
    environment: Mapping[str, str] = _NOTHING,
) -> OrderDecision:
    """When the shared experts of a layer run.

    Args:
        setting: what surrounds them.
        platform: where.
        has_auxiliary_stream: the device has one; the environment may take it away, and does nothing else.
        num_tokens: M of this call.
        environment: of the process, or any other.

    Raises:
        TypeError, ValueError: an argument of another type or range, or a variable's value, by name.
    """
    if not isinstance(setting, SharedExpertsSetting):
        raise TypeError(f"setting: expected a SharedExpertsSetting, got {type(setting).__name__}")
    if not isinstance(platform, Platform):
        raise TypeError(f"platform: expected a Platform, got {type(platform).__name__}")
    expect_bool("has_auxiliary_stream", has_auxiliary_stream)
    expect_int("num_tokens", num_tokens, low=0)
    question = _Question(
        setting,
        platform,
        has_auxiliary_stream,
        is_stream_disabled(environment),
        num_tokens,
        stream_token_threshold(environment),
    )
    reasons = []
    for test, order, asked in TESTS:
        holds, causes = asked(question)
        reasons.append(OrderReason(test, order, holds, tuple(causes), " and ".join(causes.values())))
        if holds:
            break
    return OrderDecision(reasons[-1].order, tuple(reasons))


def order_of_call(
    setting: SharedExpertsSetting, platform: Platform, has_auxiliary_stream: bool, num_tokens: int
) -> OrderDecision:
    """`shared_experts_order` in this process's environment, remembered."""
    threshold, switch = os.environ.get(THRESHOLD_VARIABLE, ""), os.environ.get(SWITCH_VARIABLE, "")
    return _remembered(setting, platform, has_auxiliary_stream, num_tokens, threshold, switch)


@lru_cache(maxsize=4096)
def _remembered(
    setting: SharedExpertsSetting,
    platform: Platform,
    has_auxiliary_stream: bool,
    num_tokens: int,
    threshold: str,
    switch: str,
) -> OrderDecision:
    environment = {THRESHOLD_VARIABLE: threshold, SWITCH_VARIABLE: switch}
    return shared_experts_order(
        setting,
        platform,
        has_auxiliary_stream=has_auxiliary_stream,
        num_tokens=num_tokens,
        environment=environment,
    )
