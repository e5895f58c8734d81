"""The oracle: a pure function of configuration, platform, available kernels and the user's request.

It reads no global state: the environment is handed in. The rules, in order: platforms with experts of their own;
LoRA; an explicit request; the first candidate of the line whose kernel is there and whose predicate accepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..checks import expect_instance
from ..config import ActivationFormat, MoEConfig
from ..experts.readiness import Readiness, State
from ..platform import Platform
from .backends import AUTO, EXPERTS, experts_class
from .backends import UnquantizedMoeBackend as Backend
from .decision import BackendRefusedError, Decision, Reason
from .rules import LORA_SOURCE, LORA_VENDORS, ONLY_ON_REQUEST, PRIORITY_SOURCE, Demotion, candidates

ENVIRONMENT_VARIABLE = "MOEGATE_BACKEND"

_NOTHING: Mapping[str, str] = MappingProxyType({})
_BY_NAME = {backend.value: backend for backend in Backend}


def parse_request(request: str | None, environment: Mapping[str, str] = _NOTHING) -> tuple[Backend | None, str]:
    """The backend that the user asks for, None for `auto`, and who asks: the argument's or the variable's name.

    An argument wins, also the argument `auto`; an empty variable asks for nothing.

    Raises:
        TypeError: a request that is not a string.
        ValueError: an unknown name.
    """
    if request is not None:
        name, origin = request, "backend"
    else:
        expect_instance("environment", environment, Mapping)
        name, origin = environment.get(ENVIRONMENT_VARIABLE) or AUTO, ENVIRONMENT_VARIABLE
    if not isinstance(name, str):
        raise TypeError(f"{origin}: expected a backend's name, got {type(name).__name__} {name!r}")
    if name == AUTO:
        return None, origin
    if name not in _BY_NAME:
        raise ValueError(f"{origin}: expected one of {[AUTO, *_BY_NAME]}, got {name!r}")
    return _BY_NAME[name], origin


class _Question:
    """One question to the oracle, and what every rule needs to answer it."""

    def __init__(self, config: MoEConfig, platform: Platform, available: Mapping[Backend, Readiness]):
        self.config = config
        self.platform = platform
        self.available = available
        self.line, held = candidates(config, platform)
        self.demotions = tuple(rule.name for rule in held)
        self.moved: dict[Backend, list[Demotion]] = {}
        for rule in held:
            for backend in rule.backends:
                self.moved.setdefault(backend, []).append(rule)

    @property
    def triton(self) -> Backend:
        """The Triton backend of this configuration's activation format."""
        batched = self.config.activation_format is ActivationFormat.BATCHED
        return Backend.BATCHED_TRITON if batched else Backend.TRITON

    def obstacle(self, backend: Backend, *, asked_for: bool) -> tuple[str, str] | None:
        """Why `backend` cannot serve, with who says so; None where it can."""
        readiness = self.available.get(backend)
        if readiness is None:
            return "its kernel is not among the available ones", "availability"
        if readiness.state is State.ABSENT or (readiness.state is State.ON_REQUEST and not asked_for):
            return readiness.why, "availability"
        experts = experts_class(backend)
        refusal = experts.refusal(self.config, self.platform)
        return None if refusal is None else (refusal, f"{experts.__name__}.refusal")

    def reason(self, backend: Backend, taken: bool, why: str, source: str) -> Reason:
        """A reason that also bears the demotions of its candidate."""
        return Reason(backend, taken, why, source, tuple(rule.name for rule in self.moved.get(backend, ())))

    def behind(self, backend: Backend, winner: Backend) -> Reason:
        """Why a candidate that could serve stands behind the one taken."""
        rules = self.moved.get(backend)
        if rules:
            return self.reason(backend, False, f"{winner} comes first: {rules[0].why}", rules[0].source)
        return self.reason(backend, False, f"{winner} comes first", PRIORITY_SOURCE)

    def everyone(self) -> list[Backend]:
        """Every candidate of this platform: the line, then those that serve only where asked for."""
        return self.line + [b for b in ONLY_ON_REQUEST.get(self.platform.vendor, ()) if b not in self.line]

    def settle(self, chosen: Backend, why: str, source: str, others: str, *, asked_for: bool) -> tuple[Reason, ...]:
        """The reasons where one rule names the only backend that may serve.

        Raises:
            BackendRefusedError: that backend cannot serve.
        """
        obstacle = self.obstacle(chosen, asked_for=asked_for)
        everyone = self.everyone()
        if chosen not in everyone:
            everyone.insert(0, chosen)
        taken_why, taken_source = (why, source) if obstacle is None else obstacle
        reasons = tuple(
            self.reason(b, obstacle is None, taken_why, taken_source)
            if b is chosen
            else self.reason(b, False, others, source)
            for b in everyone
        )
        if obstacle is not None:
            raise BackendRefusedError(f"{why}, but {chosen} cannot serve: {obstacle[0]}", reasons, self.demotions)
        return reasons


def _with_own_experts(question: _Question, asked: Backend | None, origin: str) -> Decision:
    """TPU and out-of-tree platforms: their own entry, no experts class of ours, no LoRA."""
    (own,) = question.line
    where = f"{question.platform.vendor} brings its own experts; moegate ships none"
    refusal = None
    if question.config.is_lora_enabled:
        refusal = f"is_lora_enabled: {question.platform.vendor} experts apply no LoRA"
    elif asked not in (None, own):
        refusal = f"{origin}: {asked} was asked for, but {question.platform.vendor} runs {own} alone"
    if refusal is not None:
        raise BackendRefusedError(refusal, (question.reason(own, False, refusal, "platform"),), question.demotions)
    return Decision(own, None, (question.reason(own, True, where, "platform"),), question.demotions)


def _with_lora(question: _Question, asked: Backend | None, origin: str) -> Decision:
    """LoRA on a GPU: the Triton experts of the deployment's activation format, or an error."""
    chosen = question.triton
    meant = chosen if asked is Backend.TRITON else asked
    warnings = ()
    if meant not in (None, chosen):
        warnings = (
            f"{origin}: {meant} was asked for, but LoRA is enabled, which the Triton experts apply alone: "
            f"{chosen} is used ({LORA_SOURCE})",
        )
    why = f"LoRA is enabled: the {question.config.activation_format} format's Triton experts apply it"
    others = "LoRA is enabled, which the Triton experts apply alone"
    reasons = question.settle(chosen, why, LORA_SOURCE, others, asked_for=meant is chosen)
    return Decision(chosen, experts_class(chosen), reasons, question.demotions, warnings)


def _as_asked(question: _Question, asked: Backend, origin: str) -> Decision:
    """An explicit request: honoured or refused, never replaced."""
    chosen = question.triton if asked is Backend.TRITON else asked
    what = f"{origin}: {asked} was asked for"
    if chosen is not asked:
        what += f", which in the {question.config.activation_format} format means {chosen}"
    if chosen not in question.everyone():
        reasons = tuple(question.reason(b, False, what, origin) for b in question.everyone())
        known = ", ".join(question.everyone())
        raise BackendRefusedError(f"{what}, but {question.platform} has {known} alone", reasons, question.demotions)
    reasons = question.settle(chosen, what, origin, what, asked_for=True)
    return Decision(chosen, experts_class(chosen), reasons, question.demotions)


def _first_in_line(question: _Question) -> Decision:
    """No request: the first candidate that can serve."""
    winner: Backend | None = None
    reasons = []
    for backend in question.line:
        obstacle = question.obstacle(backend, asked_for=False)
        if obstacle is not None:
            reasons.append(question.reason(backend, False, *obstacle))
        elif winner is None:
            winner = backend
            reasons.append(question.reason(backend, True, "the first candidate that can serve", PRIORITY_SOURCE))
        else:
            reasons.append(question.behind(backend, winner))
    for backend, why in ONLY_ON_REQUEST.get(question.platform.vendor, {}).items():
        if backend not in question.line:
            reasons.append(question.reason(backend, False, why, "platform"))
    if winner is None:
        every = "; ".join(f"{r.candidate}: {r.why}" for r in reasons)
        raise BackendRefusedError(
            f"no backend can serve this configuration on {question.platform}: {every}",
            tuple(reasons),
            question.demotions,
        )
    return Decision(winner, experts_class(winner), tuple(reasons), question.demotions)


def select_backend(
    config: MoEConfig,
    platform: Platform,
    available: Mapping[Backend, Readiness],
    request: str | None = None,
    environment: Mapping[str, str] = _NOTHING,
) -> Decision:
    """Who computes the routed experts of `config` on `platform`.

    Args:
        config: the layer.
        platform: the device.
        available: for each backend whose kernel this process knows of, whether it is there; one that is missing from
            the mapping is not. `installed_kernels` gives this machine's, `every_kernel` a machine that has all.
        request: a backend's name or `auto`; None leaves it to the environment.
        environment: what `MOEGATE_BACKEND` is read from; empty unless handed in.

    Returns:
        The decision, with a reason for every candidate.

    Raises:
        TypeError: an argument of another type.
        ValueError: an unknown backend's name, with the names that exist.
        BackendRefusedError: the backend asked for cannot serve, LoRA cannot be served, or no candidate can; with
            every candidate's reason. Sources of the rules: `rules.py`.
    """
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config: expected a MoEConfig, got {type(config).__name__}")
    if not isinstance(platform, Platform):
        raise TypeError(f"platform: expected a Platform, got {type(platform).__name__}")
    if not isinstance(available, Mapping):
        raise TypeError(f"available: expected a mapping of backends to their readiness, got {type(available).__name__}")
    for backend, readiness in available.items():
        expect_instance(f"available[{backend!r}]", readiness, Readiness)
    asked, origin = parse_request(request, environment)
    question = _Question(config, platform, available)
    if question.line[0] not in EXPERTS:
        return _with_own_experts(question, asked, origin)
    if config.is_lora_enabled and platform.vendor in LORA_VENDORS:
        return _with_lora(question, asked, origin)
    if asked is not None:
        return _as_asked(question, asked, origin)
    return _first_in_line(question)
