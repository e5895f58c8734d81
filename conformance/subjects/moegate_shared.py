"""moegate's decision on the order of shared experts, asked in the suite's plain words."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from ...impl.platform import Platform
from ...impl.shared_experts import SWITCH_VARIABLE, THRESHOLD_VARIABLE, SharedExpertsSetting, shared_experts_order
from ..shared_order import OrderAnswer, SharedOrderSpec

# What no decision may depend on: what the device calls itself, and how large it is.
_NUISANCE = (("", 0), ("NVIDIA H100 80GB HBM3", 132), ("Some Device", 78))


@cache
def _platform(name: str, nuisance: int) -> Platform:
    device, num_sms = _NUISANCE[nuisance]
    return replace(Platform.parse(name), name=device, num_sms=num_sms)


@cache
def _setting(*fields: bool | str | None) -> SharedExpertsSetting:
    return SharedExpertsSetting(*fields)


class MoegateSharedOrder:
    """`shared_experts_order`."""

    def ask(self, question: SharedOrderSpec, *, nuisance: int = 0) -> OrderAnswer:
        """The decision in plain words."""
        variables = {THRESHOLD_VARIABLE: question.threshold, SWITCH_VARIABLE: question.switch}
        try:
            decision = shared_experts_order(
                _setting(
                    question.shared,
                    question.eplb,
                    question.all_to_all,
                    question.sharded_lora,
                    question.dispatch,
                    question.external,
                ),
                _platform(question.platform, nuisance),
                has_auxiliary_stream=question.stream,
                num_tokens=question.tokens,
                environment={name: value for name, value in variables.items() if value is not None},
            )
        except ValueError as error:
            return OrderAnswer(refusal=str(error))
        except Exception as error:  # any other error is a finding, not the end of the run
            return OrderAnswer(crash=f"{type(error).__name__}: {error}")
        return OrderAnswer(
            decision.order.value,
            tuple((reason.test.value, reason.taken, reason.causes, reason.why) for reason in decision.reasons),
        )
