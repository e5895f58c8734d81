"""moegate's backend oracle, asked in the suite's plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache

import torch

from ...impl.config import Activation, ActivationFormat, MoEConfig, ParallelConfig, QuantScheme
from ...impl.experts.readiness import READY, Readiness, absent, on_request
from ...impl.oracle.backends import UnquantizedMoeBackend, experts_class
from ...impl.oracle.decision import BackendRefusedError
from ...impl.oracle.select import ENVIRONMENT_VARIABLE, select_backend
from ...impl.platform import Platform
from ..oracle import KERNELS, Answer, OracleSpec

_ABSENT = absent("left out by the question")
_ON_REQUEST = on_request("installed but not compiled")
# What no decision may depend on: the model's other sizes, the ranks' numbers, what the device calls itself.
_NUISANCE = (
    {"num_experts": 128, "top_k": 8, "hidden_size": 2048, "name": "", "num_sms": 0},
    {"num_experts": 60, "top_k": 4, "hidden_size": 4096, "name": "NVIDIA H100 80GB HBM3", "num_sms": 132},
    {"num_experts": 256, "top_k": 1, "hidden_size": 7168, "name": "Some Device", "num_sms": 78},
)


@cache
def _platform(name: str, nuisance: int) -> Platform:
    vendor, _, rest = name.partition(":")
    platform = Platform.parse(vendor if rest == "interpreted" else name)
    values = _NUISANCE[nuisance]
    return replace(platform, name=values["name"], num_sms=values["num_sms"], interpreted=rest == "interpreted")


@cache
def _parallel(dp: int, ep: int, tp: int, nuisance: int) -> ParallelConfig:
    last = nuisance > 0
    return ParallelConfig(
        dp_size=dp,
        ep_size=ep,
        tp_size=tp,
        dp_rank=(dp - 1) * last,
        ep_rank=(ep - 1) * last,
        tp_rank=(tp - 1) * last,
    )


@cache
def _available(missing: tuple[str, ...], asked_for: tuple[str, ...]) -> Mapping[UnquantizedMoeBackend, Readiness]:
    states = dict.fromkeys(KERNELS, READY) | dict.fromkeys(asked_for, _ON_REQUEST) | dict.fromkeys(missing, _ABSENT)
    return {UnquantizedMoeBackend(name): state for name, state in states.items()}


# The last few: one question asks for its configuration once itself and once for every predicate.
@lru_cache(maxsize=64)
def _config(
    dtype: str,
    scheme: str,
    block_shape: tuple[int, int] | None,
    activation: str,
    is_batched: bool,
    is_lora_enabled: bool,
    weight_on_input: bool,
    has_bias: bool,
    parallel: tuple[int, int, int],
    intermediate_size: int,
    nuisance: int,
) -> MoEConfig:
    values = _NUISANCE[nuisance]
    return MoEConfig(
        num_experts=values["num_experts"],
        top_k=1 if weight_on_input else values["top_k"],
        hidden_size=values["hidden_size"],
        intermediate_size=intermediate_size * parallel[2],
        dtype=getattr(torch, dtype),
        scheme=QuantScheme(scheme),
        block_shape=block_shape,
        activation=Activation(activation),
        activation_format=ActivationFormat.BATCHED if is_batched else ActivationFormat.STANDARD,
        apply_router_weight_on_input=weight_on_input,
        is_lora_enabled=is_lora_enabled,
        has_bias=has_bias,
        parallel=_parallel(*parallel, nuisance),
    )


def moe_config(question: OracleSpec, nuisance: int = 0) -> MoEConfig:
    """The configuration that a question describes."""
    return _config(
        question.dtype,
        question.scheme,
        question.block_shape,
        question.activation,
        question.is_batched,
        question.is_lora_enabled,
        question.weight_on_input,
        question.has_bias,
        (question.dp, question.ep, question.tp),
        question.intermediate_size,
        nuisance,
    )


class MoegateOracle:
    """`select_backend`, and the predicates of the experts classes."""

    def ask(self, question: OracleSpec, *, nuisance: int = 0) -> Answer:
        """The oracle's answer in plain words."""
        environment = {} if question.environment is None else {ENVIRONMENT_VARIABLE: question.environment}
        try:
            decision = select_backend(
                moe_config(question, nuisance),
                _platform(question.platform, nuisance),
                _available(question.absent, question.on_request),
                question.request,
                environment,
            )
        except BackendRefusedError as error:
            return Answer(reasons=_plain(error.reasons), demotions=error.demotions, refusal=str(error))
        except ValueError as error:
            return Answer(refusal=str(error))
        except Exception as error:  # any other error is a finding, not the end of the run
            return Answer(crash=f"{type(error).__name__}: {error}")
        return Answer(
            backend=decision.backend.value,
            has_experts=decision.experts is not None,
            reasons=_plain(decision.reasons),
            demotions=decision.demotions,
            warnings=decision.warnings,
        )

    def refusal(self, backend: str, question: OracleSpec) -> str | None:
        """The predicate of the backend's experts class."""
        experts = experts_class(UnquantizedMoeBackend(backend))
        return experts.refusal(moe_config(question), _platform(question.platform, 0))


def _plain(reasons: tuple) -> tuple[tuple[str, bool, str, str, tuple[str, ...]], ...]:
    return tuple((r.candidate.value, r.taken, r.why, r.source, r.demotions) for r in reasons)
