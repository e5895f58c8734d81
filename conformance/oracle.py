"""ORACLE: the backend oracle's whole question space, and what must hold on every point of it.

The space is finite, so it is enumerated, not sampled. The rules stand here a second time, written from their
description and not from any implementation: who stands in line where, and what moves a backend to the back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, product
from operator import attrgetter
from typing import Any, ClassVar, Protocol

from .judge import Property, declare
from .spec import Spec

_CAPABILITIES = (
    *("7.0", "7.2", "7.5", "8.0", "8.6", "8.7", "8.9"),
    *("9.0", "10.0", "10.1", "10.3", "11.0", "12.0", "12.1"),
)
CUDA = tuple(f"cuda:{capability}" for capability in _CAPABILITIES)
ROCM = ("rocm:gfx90a", "rocm:gfx942", "rocm:gfx950")
CPUS = ("cpu", "cpu:interpreted")
OWN_EXPERTS = ("tpu", "out_of_tree")
PLATFORMS = (*CUDA, *ROCM, "xpu", *CPUS, *OWN_EXPERTS)
HOPPER = ("cuda:9.0",)

# dtype, scheme, block_shape.
WEIGHTS = (
    ("bfloat16", "none", None),
    ("float16", "none", None),
    ("float32", "none", None),
    ("bfloat16", "fp8_w8a8", None),
    ("bfloat16", "fp8_w8a8", (128, 128)),
    ("bfloat16", "int8_w8a8", None),
    ("bfloat16", "int8_w8a16", None),
    ("bfloat16", "int8_w8a16", (0, 128)),
    ("bfloat16", "int4_w4a16", (0, 32)),
    ("bfloat16", "int4_w4a16", (0, 64)),
    ("bfloat16", "int4_w4a16", (0, 128)),
    ("float16", "int4_w4a16", (0, 128)),
)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai", "silu_no_mul", "gelu_no_mul", "relu2_no_mul")
# Where fp8 e4m3 is a type: NVIDIA's devices from 8.9, AMD's from gfx942; a CPU emulates it.
FP8 = (*CUDA[CUDA.index("cuda:8.9") :], *ROCM[1:], *CPUS)
# Where a Triton kernel with bfloat16 products runs.
TRITON = (*CUDA[CUDA.index("cuda:8.0") :], *ROCM, "xpu", "cpu:interpreted")
# FlashInfer builds its CUTLASS module for these (its dispatch has no 10.1), and ships TensorRT-LLM's for two.
CUTLASS = ("cuda:8.9", "cuda:9.0", "cuda:10.0", "cuda:10.3", "cuda:11.0", "cuda:12.0", "cuda:12.1")
TRTLLM = ("cuda:10.0", "cuda:10.3")
TRITON_FAMILY = ("triton", "batched_triton")
FLASHINFER = ("flashinfer_trtllm", "flashinfer_cutlass")
KERNELS = (*FLASHINFER, "aiter", *TRITON_FAMILY, "cpu", "xpu")
BACKENDS = (*KERNELS, *OWN_EXPERTS)
REQUESTS = (None, "auto", *BACKENDS, "flashinfer")  # the last is no backend's name
# Of one rank; 704 is a multiple of 64 alone.
INTERMEDIATE_SIZES = (768, 704)


@dataclass(frozen=True)
class OracleSpec(Spec):
    """One question to an oracle, in plain words.

    Attributes:
        platform: of `PLATFORMS`.
        intermediate_size: of one rank.
        absent: backends whose kernel is not there.
        on_request: backends whose kernel is used only where the user names it.
        request: the argument, None for none.
        environment: the environment variable's value, None where it is not set.
        has_bias: the experts' GEMMs add biases.
    """

    facet: ClassVar[str] = "oracle"
    is_covered: ClassVar[bool] = False

    platform: str = "cuda:9.0"
    dtype: str = "bfloat16"
    scheme: str = "none"
    block_shape: tuple[int, int] | None = None
    activation: str = "silu"
    is_batched: bool = False
    is_lora_enabled: bool = False
    weight_on_input: bool = False
    dp: int = 1
    ep: int = 1
    tp: int = 1
    intermediate_size: int = 768
    absent: tuple[str, ...] = ()
    on_request: tuple[str, ...] = ()
    request: str | None = None
    environment: str | None = None
    has_bias: bool = False

    @property
    def is_layer(self) -> bool:
        """Whether there is such a layer: groups divide its columns, and no shard cuts a block."""
        rows, columns = self.block_shape or (1, 1)
        if rows == 0:
            return self.intermediate_size % columns == 0
        return self.tp == 1 or (self.intermediate_size % rows == 0 and self.intermediate_size % columns == 0)

    @property
    def triton(self) -> str:
        """The Triton backend of this question's activation format."""
        return "batched_triton" if self.is_batched else "triton"

    @property
    def asked(self) -> str:
        """What the user asks for: the argument, else the variable, else `auto`."""
        return self.request if self.request is not None else self.environment or "auto"

    @property
    def gpu_lora(self) -> bool:
        """LoRA where the Triton experts alone apply it."""
        return self.is_lora_enabled and self.platform not in CPUS and self.platform not in OWN_EXPERTS


@dataclass(frozen=True)
class Answer:
    """An oracle's answer, in plain words.

    Attributes:
        backend: the decision; None where it refused.
        has_experts: whether the decision names an experts class.
        reasons: (candidate, taken, why, source, names of demotions) for each candidate in the order of the line.
        demotions: names of the demotion rules that hold, in the order applied; None where the oracle does not tell.
        warnings: what the user is told.
        refusal: the message of a refusal.
        crash: the message of any other error.
    """

    backend: str | None = None
    has_experts: bool = False
    reasons: tuple[tuple[str, bool, str, str, tuple[str, ...]], ...] = ()
    demotions: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()
    refusal: str | None = None
    crash: str | None = None


class OracleFacet(Protocol):
    """What a subject's `oracle()` gives."""

    def ask(self, question: OracleSpec, *, nuisance: int = 0) -> Answer:
        """The oracle's answer; `nuisance` varies what may not matter (ranks, names, sizes beside those given)."""
        ...

    def refusal(self, backend: str, question: OracleSpec) -> str | None:
        """Why the backend's own predicate refuses the question's configuration; None where it accepts."""
        ...


# --- the rules, a second time ------------------------------------------------------------------------------------


def expected_demotions(question: OracleSpec) -> dict[str, tuple[str, ...]]:
    """The demotion rules that hold and whom each moves, in order."""
    rules = {}
    if question.platform in HOPPER:
        rules["hopper"] = FLASHINFER
    if question.dp > 1:
        rules["data_parallel"] = ("flashinfer_cutlass",)
    if question.activation == "swigluoai":
        rules["swigluoai"] = FLASHINFER
    return rules


def priorities(question: OracleSpec) -> tuple[str, ...]:
    """The line before any demotion."""
    is_quantised = question.scheme != "none"
    if question.platform in CUDA:
        return (*TRITON_FAMILY, *FLASHINFER) if is_quantised else (*FLASHINFER, *TRITON_FAMILY)
    if question.platform in ROCM:
        return (*TRITON_FAMILY, "aiter") if is_quantised else ("aiter", *TRITON_FAMILY)
    if question.platform == "xpu":
        return (*TRITON_FAMILY, "xpu") if is_quantised else ("xpu", "triton")
    return ("cpu",) if question.platform in CPUS else (question.platform,)


def expected_line(question: OracleSpec) -> list[str]:
    """The line of candidates."""
    line = list(priorities(question))
    for moved in expected_demotions(question).values():
        for backend in moved:
            if backend in line:
                line.remove(backend)
                line.append(backend)
    return line


def only_on_request(question: OracleSpec) -> tuple[str, ...]:
    """Backends outside the line that are honoured where asked for by name."""
    if question.platform in CPUS:
        return TRITON_FAMILY
    return ("batched_triton",) if question.platform == "xpu" and question.scheme == "none" else ()


# --- the properties ----------------------------------------------------------------------------------------------

TOTAL = declare("ORACLE-01", "every question gets a decision or a refusal with reasons, and no other error", "oracle")
SUPPORTED = declare(
    "ORACLE-02", "the backend decided on has its kernel and accepts the configuration by its own predicate", "oracle"
)
LORA = declare(
    "ORACLE-03",
    "with LoRA on CUDA, ROCm and XPU the decision is the Triton backend of the activation format, or a refusal",
    "oracle",
)
HOPPER_AUTO = declare(
    "ORACLE-04", "on Hopper auto never takes FlashInfer where a Triton can serve, and names it behind Triton", "oracle"
)
LINE = declare(
    "ORACLE-05", "candidates stand in the order of the priorities, then of the demotions that hold", "oracle"
)
DATA_PARALLEL = declare(
    "ORACLE-06", "with data parallelism flashinfer_cutlass is never before Triton, in reasons or decision", "oracle"
)
SWIGLUOAI = declare("ORACLE-07", "with SwigluOAI both FlashInfer backends stand behind Triton", "oracle")
REQUEST = declare(
    "ORACLE-08", "a request is honoured or refused, never replaced; LoRA alone overrides it, with one warning", "oracle"
)
REASONS = declare(
    "ORACLE-09", "every candidate has one reason with words and source, and the decision's is taken", "oracle"
)
DEMOTIONS = declare(
    "ORACLE-10", "the demotions named are those that hold, in order, on every platform and on each candidate", "oracle"
)
FIRST = declare(
    "ORACLE-11", "auto takes the first candidate of the line that can serve, and refuses only where none can", "oracle"
)
OWN = declare(
    "ORACLE-12",
    "TPU and out-of-tree platforms return their own entry without an experts class, and refuse LoRA",
    "oracle",
)
CPU_AUTO = declare("ORACLE-13", "auto on a CPU is cpu, with LoRA too", "oracle")
NAMES = declare("ORACLE-14", "an unknown backend's name is an error that lists the names", "oracle")
TRUTH = declare(
    "ORACLE-15",
    "no decision breaks what is known of a backend: fp8, families, alignment, LoRA, formats, weights on inputs, biases",
    "oracle",
)
SAME_FROM_ENVIRONMENT = declare(
    "ORACLE-16", "a request by argument and by environment get the same answer, and the argument wins", "oracle"
)
NO_STATE = declare("ORACLE-17", "the same question gets the same answer, whatever was asked in between", "oracle")
IRRELEVANT = declare(
    "ORACLE-18", "what should not matter does not: ranks, names, sizes, how many data-parallel ranks", "oracle"
)
INDEPENDENT = declare("ORACLE-19", "taking away a kernel that was not chosen changes no decision", "oracle")

PUBLISHED = declare(
    "ORACLE-20",
    "each predicate in line, and the CPU's, accepts what its kernels are published for, and nothing else",
    "oracle",
)


# What a question says of the layer and the platform: all but what is there and what is asked for.
_configuration = attrgetter(
    *("platform", "dtype", "scheme", "block_shape", "activation", "is_batched", "is_lora_enabled", "weight_on_input"),
    *("dp", "ep", "tp", "intermediate_size", "has_bias"),
)


class _Configured:
    """What holds of every question about one configuration, worked out once."""

    def __init__(self, facet: OracleFacet, question: OracleSpec) -> None:
        self._facet, self._question = facet, question
        self.demotions = expected_demotions(question)
        self.line = expected_line(question)
        self._refusals: dict[str, str | None] = {}
        self._published: str | None = None

    def refusal(self, backend: str) -> str | None:
        """What the backend's own predicate says."""
        if backend not in self._refusals:
            self._refusals[backend] = self._facet.refusal(backend, self._question)
        return self._refusals[backend]

    def unpublished(self) -> str:
        """The first predicate that does not say what its kernels are published for; empty: none."""
        if self._published is None:
            self._published = next(filter(None, map(self._against_published, dict.fromkeys((*self.line, "cpu")))), "")
        return self._published

    def _against_published(self, backend: str) -> str:
        refusal = self.refusal(backend)
        if (refusal is None) == published(backend, self._question):
            return ""
        return f"{backend} is published for this layer, and refuses: {refusal}" if refusal else f"{backend} accepts"


class Point:
    """One question, its answer, and what the judgements share.

    Args:
        facet: the oracle.
        question: what it was asked.
        answer: what it said.
        configured: what is known of the question's configuration; None: nothing yet.
    """

    def __init__(
        self, facet: OracleFacet, question: OracleSpec, answer: Answer, configured: _Configured | None = None
    ) -> None:
        self.question = question
        self.answer = answer
        self.known = question.asked == "auto" or question.asked in BACKENDS
        self.own_experts = question.platform in OWN_EXPERTS
        self.configured = configured or _Configured(facet, question)
        self.line = self.configured.line

    def obstacle(self, backend: str, *, asked_for: bool = False) -> str | None:
        """Why a backend cannot serve: its kernel, or its own predicate."""
        if backend in self.question.absent or (backend in self.question.on_request and not asked_for):
            return "its kernel is not there"
        return self.configured.refusal(backend)

    def behind_triton(self, backends: Iterable[str]) -> str | None:
        """A violation where one of the backends is named or taken before Triton."""
        order = [candidate for candidate, *_ in self.answer.reasons]
        for backend in backends:
            if backend in order and any(triton in order[order.index(backend) :] for triton in TRITON_FAMILY):
                return f"{backend} stands before Triton in {order}"
        return None

    def auto_flashinfer_over_triton(self, backends: Iterable[str]) -> str | None:
        """A violation where auto decides on one of the backends though a Triton can serve."""
        if self.question.asked == "auto" and self.answer.backend in tuple(backends):
            able = [triton for triton in TRITON_FAMILY if self.obstacle(triton) is None]
            if able:
                return f"took {self.answer.backend} though {able[0]} can serve"
        return None


# A judgement says None where it does not apply, "" where the property holds, and the violation otherwise.
Judgement = Callable[[Point], str | None]


def _total(point: Point) -> str | None:
    answer = point.answer
    if answer.crash is not None:
        return f"error without a decision: {answer.crash}"
    if answer.backend is None and not answer.refusal:
        return "neither a decision nor a refusal"
    if answer.backend is None and point.known and not answer.reasons:
        return f"a refusal without reasons: {answer.refusal}"
    return ""


def _supported(point: Point) -> str | None:
    backend = point.answer.backend
    if backend is None or point.own_experts:
        return None
    if backend not in KERNELS:
        return f"decided on {backend}, which has no kernel"
    obstacle = point.obstacle(backend, asked_for=point.question.asked in (backend, "triton"))
    return "" if obstacle is None else f"decided on {backend}: {obstacle}"


def _lora(point: Point) -> str | None:
    question, answer = point.question, point.answer
    if not question.gpu_lora or not point.known:
        return None
    if answer.backend is None:
        if point.obstacle(question.triton, asked_for=question.asked in (question.triton, "triton")) is None:
            return f"refused though {question.triton} can serve: {answer.refusal}"
        return ""
    return "" if answer.backend == question.triton else f"decided on {answer.backend}, not on {question.triton}"


def _hopper(point: Point) -> str | None:
    if point.question.platform not in HOPPER or not point.known:
        return None
    if point.question.asked not in ("auto", *point.line):
        return None
    return point.behind_triton(FLASHINFER) or point.auto_flashinfer_over_triton(FLASHINFER) or ""


def _line(point: Point) -> str | None:
    if not point.answer.reasons or not point.known:
        return None
    order = [candidate for candidate, *_ in point.answer.reasons]
    inside = [candidate for candidate in order if candidate in point.line]
    return "" if inside == point.line else f"expected {point.line}, got {order}"


def _data_parallel(point: Point) -> str | None:
    if point.question.dp == 1 or "flashinfer_cutlass" not in point.line or not point.known:
        return None
    backends = ("flashinfer_cutlass",)
    return point.behind_triton(backends) or point.auto_flashinfer_over_triton(backends) or ""


def _swigluoai(point: Point) -> str | None:
    if point.question.activation != "swigluoai" or "flashinfer_cutlass" not in point.line or not point.known:
        return None
    return point.behind_triton(FLASHINFER) or point.auto_flashinfer_over_triton(FLASHINFER) or ""


def _request(point: Point) -> str | None:
    question, answer = point.question, point.answer
    if question.asked == "auto" or not point.known:
        return "" if not answer.warnings else f"warned without a request: {answer.warnings}"
    if point.own_experts:
        ok = answer.backend in (None, question.asked)
        return "" if ok else f"{question.asked} was replaced by {answer.backend}"
    meant = question.triton if question.asked == "triton" else question.asked
    if question.gpu_lora:
        if answer.backend is None:
            return ""
        overridden = meant != question.triton
        named = [w for w in answer.warnings if meant in w and question.triton in w]
        if overridden and not (len(answer.warnings) == len(named) == 1):
            return f"expected one warning that names {meant} and {question.triton}, got {answer.warnings}"
        if not overridden and answer.warnings:
            return f"warned about a request that was honoured: {answer.warnings}"
        return ""
    if answer.warnings:
        return f"warned: {answer.warnings}"
    if answer.backend is not None:
        return "" if answer.backend == meant else f"{question.asked} was replaced by {answer.backend}"
    reachable = meant in point.line or meant in only_on_request(question)
    if reachable and point.obstacle(meant, asked_for=True) is None:
        return f"{question.asked} was refused though it can serve: {answer.refusal}"
    return "" if meant in str(answer.refusal) else f"the refusal does not name {meant}: {answer.refusal}"


def _reasons(point: Point) -> str | None:
    answer = point.answer
    if not answer.reasons:
        return None
    order = [candidate for candidate, *_ in answer.reasons]
    if len(set(order)) != len(order):
        return f"a candidate twice: {order}"
    missing = [candidate for candidate in point.line if candidate not in order]
    if missing:
        return f"no reason for {missing}"
    empty = [candidate for candidate, _, why, source, _ in answer.reasons if not why or not source]
    if empty:
        return f"no words or no source for {empty}"
    taken = [candidate for candidate, is_taken, *_ in answer.reasons if is_taken]
    expected = [] if answer.backend is None else [answer.backend]
    return "" if taken == expected else f"decided on {answer.backend}, but the reasons took {taken}"


def _demotions(point: Point) -> str | None:
    answer = point.answer
    if answer.demotions is None or not point.known:
        return None
    expected = point.configured.demotions
    if answer.demotions != tuple(expected):
        return f"expected {tuple(expected)}, got {answer.demotions}"
    for candidate, _, _, _, demotions in answer.reasons:
        own = tuple(rule for rule, moved in expected.items() if candidate in moved)
        if demotions != own:
            return f"{candidate}: expected {own}, got {demotions}"
    return ""


def _first(point: Point) -> str | None:
    question, answer = point.question, point.answer
    if question.asked != "auto" or question.gpu_lora or point.own_experts:
        return None
    able = next((backend for backend in point.line if point.obstacle(backend) is None), None)
    return "" if answer.backend == able else f"expected {able} first of {point.line}, got {answer.backend}"


def _own(point: Point) -> str | None:
    question, answer = point.question, point.answer
    if not point.own_experts or not point.known:
        return None
    if question.is_lora_enabled:
        named = answer.refusal is not None and "lora" in answer.refusal.lower() and question.platform in answer.refusal
        return "" if named else f"expected a refusal of LoRA by name, got {answer.backend} {answer.refusal}"
    if question.asked in ("auto", question.platform):
        ok = answer.backend == question.platform and not answer.has_experts
        return "" if ok else f"expected {question.platform} without experts, got {answer}"
    return "" if answer.backend is None else f"{question.asked} gave {answer.backend}"


def _cpu_auto(point: Point) -> str | None:
    if point.question.platform not in CPUS or point.question.asked != "auto":
        return None
    if point.answer.backend is None:
        return "" if point.obstacle("cpu") is not None else f"refused though cpu can serve: {point.answer.refusal}"
    return "" if point.answer.backend == "cpu" else f"got {point.answer.backend}"


def _names(point: Point) -> str | None:
    if point.known:
        return None
    refusal = point.answer.refusal or ""
    missing = [name for name in ("auto", *BACKENDS) if name not in refusal]
    if point.question.asked not in refusal:
        return f"the error does not say what came: {refusal}"
    return "" if not missing else f"the error does not list {missing}: {refusal}"


def _truth(point: Point) -> str | None:
    question, backend = point.question, point.answer.backend
    if backend is None or point.own_experts:
        return None
    platform = question.platform
    is_declared = backend not in (*TRITON_FAMILY, "cpu")
    false = [
        (question.scheme == "fp8_w8a8" and platform not in FP8, "fp8 e4m3 where the device has none"),
        (backend == "triton" and question.is_batched, "the standard format's kernel for the batched format"),
        (backend == "batched_triton" and not question.is_batched, "the batched format's kernel for the standard one"),
        (is_declared and question.is_lora_enabled, "LoRA"),
        (is_declared and question.is_batched, "the batched format"),
        (backend in FLASHINFER and platform not in CUDA, "another vendor's platform"),
        (
            backend == "flashinfer_trtllm" and platform not in TRTLLM,
            "another capability than 10.0, 10.3",
        ),
        (backend in FLASHINFER and question.intermediate_size % 128 != 0, "an unaligned intermediate size"),
        (backend in FLASHINFER and question.weight_on_input, "routing weights on the input"),
        (backend in (*FLASHINFER, "aiter") and question.has_bias, "biases of the GEMMs"),
        (backend in FLASHINFER and question.dtype == "float32", "float32"),
        (backend in FLASHINFER and question.scheme.startswith("int"), "integer weights"),
        (
            backend == "flashinfer_trtllm"
            and question.activation in ("gelu", "gelu_tanh", "gelu_no_mul", "silu_no_mul"),
            "an activation that it has no kernel of",
        ),
        (backend == "batched_triton" and question.scheme.startswith("int"), "integer weights in the batched format"),
        (backend == "aiter" and platform not in ROCM[1:], "a platform other than gfx942 and gfx950"),
        (backend == "xpu" and platform != "xpu", "a platform other than xpu"),
        (backend == "cpu" and platform not in CPUS, "a platform other than cpu"),
        (backend in TRITON_FAMILY and platform == "cpu", "a CPU without Triton's interpreter"),
    ]
    return next((f"{backend} for {what}" for is_false, what in false if is_false), "")


def published(backend: str, question: OracleSpec) -> bool:
    """Whether a backend's kernels are for such a layer: Triton's by our README, the others by their libraries."""
    platform, scheme, activation = question.platform, question.scheme, question.activation
    if backend in (*TRITON_FAMILY, "cpu"):
        devices = CPUS if backend == "cpu" else TRITON
        schemes = ("none", "fp8_w8a8") if backend == "batched_triton" else (scheme,)
        takes_fp8 = backend == "cpu" or scheme != "fp8_w8a8" or platform in FP8
        return platform in devices and scheme in schemes and takes_fp8 and question.is_batched == ("batched" in backend)
    if question.is_lora_enabled or question.is_batched or question.weight_on_input or question.dtype == "float32":
        return False
    if question.has_bias and backend != "xpu":
        return False
    blocks = question.block_shape
    match backend:
        case "aiter":
            weights = scheme == "none" or (scheme == "fp8_w8a8" and blocks in (None, (128, 128)))
            return platform in ROCM[1:] and weights and activation in ("silu", "gelu")
        case "xpu":
            return (
                platform == "xpu" and scheme in ("none", "int4_w4a16") and activation in ("silu", "gelu", "swigluoai")
            )
        case "flashinfer_cutlass":
            return platform in CUTLASS and scheme == "none" and question.intermediate_size % 128 == 0
        case "flashinfer_trtllm":
            plain = scheme == "none" and activation in ("silu", "swigluoai", "relu2_no_mul")
            scaled = scheme == "fp8_w8a8" and blocks == (128, 128) and activation == "silu"
            sizes = question.intermediate_size % 128 == 0 and question.dtype == "bfloat16"
            return platform in TRTLLM and (plain or scaled) and sizes
    return False


def _published(point: Point) -> str | None:
    return None if point.own_experts else point.configured.unpublished()


JUDGEMENTS: tuple[tuple[Property, Judgement], ...] = (
    (TOTAL, _total),
    (SUPPORTED, _supported),
    (LORA, _lora),
    (HOPPER_AUTO, _hopper),
    (LINE, _line),
    (DATA_PARALLEL, _data_parallel),
    (SWIGLUOAI, _swigluoai),
    (REQUEST, _request),
    (REASONS, _reasons),
    (DEMOTIONS, _demotions),
    (FIRST, _first),
    (OWN, _own),
    (CPU_AUTO, _cpu_auto),
    (NAMES, _names),
    (TRUTH, _truth),
    (PUBLISHED, _published),
)


def outcome(answer: Answer) -> tuple[Any, ...]:
    """What two answers to one question must share, whatever words they use."""
    return (answer.backend, answer.has_experts, tuple((c, taken) for c, taken, *_ in answer.reasons), answer.demotions)


def judge_question(
    facet: OracleFacet, question: OracleSpec, answer: Answer | None = None, configured: _Configured | None = None
) -> list[tuple[Property, str]]:
    """Every judgement of one answer that applies: the property, and the violation or an empty string."""
    point = Point(facet, question, facet.ask(question) if answer is None else answer, configured)
    found = ((prop, judgement(point)) for prop, judgement in JUDGEMENTS)
    return [(prop, violation) for prop, violation in found if violation is not None]


def judge_relations(facet: OracleFacet, question: OracleSpec, answer: Answer) -> list[tuple[Property, str]]:
    """What relates the answer to those of neighbouring questions."""
    verdicts = []

    def same(prop: Property, other: OracleSpec, nuisance: int, what: str) -> None:
        theirs = outcome(facet.ask(other, nuisance=nuisance))
        verdicts.append((prop, "" if theirs == outcome(answer) else f"{what}: {outcome(answer)} became {theirs}"))

    same(NO_STATE, question, 0, "asked again")
    for nuisance in (1, 2):
        same(IRRELEVANT, question, nuisance, "other ranks, names and sizes")
    if question.dp > 1:
        same(IRRELEVANT, replace(question, dp=2 * question.dp), 0, "more data-parallel ranks")
    if question.request is not None:
        moved = replace(question, request=None, environment=question.request)
        same(SAME_FROM_ENVIRONMENT, moved, 0, "by environment")
        same(SAME_FROM_ENVIRONMENT, replace(question, environment="triton"), 0, "with another variable beside it")
    elif question.environment is None:
        same(SAME_FROM_ENVIRONMENT, replace(question, request="auto"), 0, "with auto as argument")
    for backend in KERNELS:
        if backend != answer.backend and backend not in question.absent and answer.backend is not None:
            fewer = facet.ask(replace(question, absent=(*question.absent, backend)))
            verdicts.append(
                (
                    INDEPENDENT,
                    "" if fewer.backend == answer.backend else f"without {backend}, {fewer.backend} is decided on",
                )
            )
    return verdicts


# --- the space ---------------------------------------------------------------------------------------------------


def configurations(platforms: Iterable[str] = PLATFORMS, weights: Iterable[Any] = WEIGHTS) -> Iterator[OracleSpec]:
    """Every configuration on every platform, with every kernel there and nothing asked for."""
    flags = (False, True)
    for platform, (dtype, scheme, block_shape), activation in product(platforms, weights, ACTIVATIONS):
        for batched, lora, on_input, dp, ep, tp, size in product(
            flags, flags, flags, (1, 2), (1, 4), (1, 2), INTERMEDIATE_SIZES
        ):
            question = OracleSpec(
                platform, dtype, scheme, block_shape, activation, batched, lora, on_input, dp, ep, tp, size
            )
            if question.is_layer:
                yield question
                if not on_input and (dp, ep, tp) == (1, 1, 1):
                    yield replace(question, has_bias=True)


_TYPICAL_WEIGHTS = (WEIGHTS[0], WEIGHTS[4], WEIGHTS[10])


def _typical(platforms: Iterable[str]) -> Iterator[OracleSpec]:
    flags = (False, True)
    for platform, weights, activation, batched, lora, dp in product(
        platforms, _TYPICAL_WEIGHTS, ("silu", "swigluoai"), flags, flags, (1, 2)
    ):
        yield OracleSpec(platform, *weights, activation, batched, lora, dp=dp)


def requests(platforms: Iterable[str] = PLATFORMS) -> Iterator[OracleSpec]:
    """Every request, by argument and by environment, with every kernel there, each one missing, or none."""
    availabilities = ((), KERNELS, *((kernel,) for kernel in KERNELS))
    for question, absent, request in product(_typical(platforms), availabilities, REQUESTS):
        yield replace(question, absent=absent, request=request)
        yield replace(question, absent=absent, environment=request)


def availabilities(platforms: Iterable[str] = PLATFORMS) -> Iterator[OracleSpec]:
    """Every set of kernels that are there, and those that are there on request alone."""
    subsets = list(chain.from_iterable(combinations(KERNELS, size) for size in range(len(KERNELS) + 1)))
    for question in _typical(platforms):
        for absent in subsets:
            yield replace(question, absent=absent)
        for request in (None, "flashinfer_cutlass", "triton"):
            yield replace(question, on_request=("flashinfer_cutlass",), request=request)


def oracle_specs() -> Any:
    """A Hypothesis strategy for a larger space: any sizes, any set of kernels, argument and variable at once."""
    from hypothesis import strategies as st

    ranks = st.sampled_from((1, 2, 3, 4, 8, 64))
    requested = st.sampled_from(REQUESTS)
    kernels = st.lists(st.sampled_from(KERNELS), unique=True, max_size=len(KERNELS)).map(tuple)
    rare = st.sampled_from((False, False, True))
    return st.builds(
        lambda weights, **rest: OracleSpec(dtype=weights[0], scheme=weights[1], block_shape=weights[2], **rest),
        weights=st.sampled_from(WEIGHTS),
        platform=st.sampled_from(PLATFORMS),
        activation=st.sampled_from(ACTIVATIONS),
        is_batched=rare,
        is_lora_enabled=rare,
        weight_on_input=rare,
        has_bias=rare,
        dp=ranks,
        ep=ranks.filter(lambda size: size <= 60),
        tp=ranks,
        intermediate_size=st.one_of(st.sampled_from((128, 256, 704, 768, 1856, 2880)), st.integers(1, 20_000)),
        absent=kernels,
        on_request=st.sampled_from(((), ("flashinfer_cutlass",), ("triton",))),
        request=requested,
        environment=requested,
    ).filter(lambda question: question.is_layer)


def covering() -> Iterator[OracleSpec]:
    """A few thousand points on which every rule meets every kind of platform: what faults are judged on."""
    platforms = ("cuda:8.0", "cuda:8.9", "cuda:9.0", "cuda:10.0", "cuda:12.0", *ROCM[:2], "xpu", *CPUS, "tpu")
    flags = (False, True)
    for platform, weights, activation, batched, lora, dp in product(
        platforms, _TYPICAL_WEIGHTS, ("silu", "swigluoai"), flags, flags, (1, 2)
    ):
        question = OracleSpec(platform, *weights, activation, batched, lora, dp=dp)
        for on_input, size in product(flags, INTERMEDIATE_SIZES):
            varied = replace(question, weight_on_input=on_input, intermediate_size=size)
            if varied.is_layer:
                yield varied
        for request in ("auto", "triton", "batched_triton", "flashinfer_cutlass", "flashinfer_trtllm", "flashinfer"):
            yield replace(question, request=request)
        yield replace(question, absent=(question.triton,))
        yield replace(question, absent=("flashinfer_trtllm",), on_request=("flashinfer_cutlass",))
        yield replace(question, ep=4, tp=2)
        yield replace(question, has_bias=True)
    for platform, weights, activation in product(platforms, _TYPICAL_WEIGHTS, ACTIVATIONS):
        yield OracleSpec(platform, *weights, activation)


@dataclass
class Count:
    """One property over an enumeration.

    Attributes:
        cases: answers judged.
        violated: how many of them violate it.
        first: the first violation and the question that showed it.
    """

    cases: int = 0
    violated: int = 0
    first: tuple[str, Spec] | None = None

    def add(self, violation: str, question: Spec) -> None:
        """Count one judgement; an empty violation is none."""
        self.cases += 1
        if violation:
            self.violated += 1
            self.first = self.first or (violation, question)


@dataclass
class Enumeration:
    """What an enumeration found.

    Attributes:
        points: questions asked.
        counts: by property.
        decisions: how often each backend was decided on ("refused" for none).
    """

    points: int = 0
    counts: dict[Property, Count] = field(default_factory=dict)
    decisions: Counter[str] = field(default_factory=Counter)

    def violated(self) -> dict[str, str]:
        """The first finding of each property that does not hold, by id."""
        return {p.id: f"{p.sentence}\n{c.first}" for p, c in self.counts.items() if c.first is not None}


def enumerate_oracle(facet: OracleFacet, questions: Iterable[OracleSpec], *, relations_every: int = 0) -> Enumeration:
    """Ask every question and judge every answer.

    Args:
        facet: the oracle.
        questions: the space.
        relations_every: relate every n-th question to its neighbours; 0 relates none.
    """
    result = Enumeration()
    counts: dict[str, Count] = {}
    # Neighbours in the space often differ in what is there and what is asked for alone.
    about: Any = None
    configured: _Configured | None = None
    for index, question in enumerate(questions):
        answer = facet.ask(question)
        if configured is None or _configuration(question) != about:
            about, configured = _configuration(question), _Configured(facet, question)
        verdicts = judge_question(facet, question, answer, configured)
        if relations_every and index % relations_every == 0:
            verdicts += judge_relations(facet, question, answer)
        for prop, violation in verdicts:
            count = counts.get(prop.id)
            if count is None:
                count = counts[prop.id] = result.counts[prop] = Count()
            count.add(violation, question)
        result.points += 1
        result.decisions[answer.backend or "refused"] += 1
    return result
