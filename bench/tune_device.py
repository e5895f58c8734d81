"""Measuring tiles on a device: one GEMM alone, a whole layer, the finalists in turn; each is right before it is timed.

`InProcess` measures where it is called. `Remote` asks a process of its own, so that a candidate that crashes or hangs
costs that process and not the search, and compiles beforehand in many processes, while nothing is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from ..impl.align import ExpertAssignment, prepare_expert_assignment, uses_naive_block_assignment
from ..impl.fused_moe import fused_experts
from ..impl.kernels.grouped_gemm import grouped_gemm
from ..impl.kernels.sizes import cdiv
from ..impl.kernels.tile import GemmOperands, gemm_operands
from ..impl.platform import Platform
from ..impl.quantization import ExpertsQuantization
from ..impl.quantize import quantize_activations
from ..impl.tuning.kernel_config import KernelConfig, use_kernel_configs
from .machine import l2_bytes
from .operands import ExpertsCall, LayerWeights, Operands, WeightBank, make_operands
from .plain import plain_experts, plain_rows, plain_weight
from .rotation import plan_rotation
from .runner import expect_right
from .timer import CudaClock, HostClock, Timing, capture_graph, choose_rounds, interleave, one_after_another
from .tune_candidates import GEMMS, Pair, gemm_sizes
from .verification import judge_rows
from .worker_pool import NOT_TRIED, Job, WorkerPool
from .workloads import Model, Workload

# L2 sizes between two reads of the same weights in the layer: w2 alone, a third of them, then still passes two.
_MULTIPLE = 6.0
_BRIEF_ROUNDS = 7
_FINAL_SECONDS, _FINAL_ROUNDS = 1.0, 40
# Seconds of one compilation, and of one request to measure; a process's start, with torch's import, is counted in.
_COMPILE_LIMIT, _MEASURE_LIMIT = 90.0, 90.0
_MOST_PROCESSES = 32
# What the driver says of a fault after which no kernel runs in the process any more.
_DEVICE_FAULTS = ("illegal memory access", "misaligned address", "launch failure", "illegal instruction", "device-side")


class CandidateError(RuntimeError):
    """A candidate that cannot be measured; its text says why, whoever found out."""


class Bench(Protocol):
    """What a search measures with."""

    times_gemms: bool
    """Whether GEMMs can be timed apart; where not, only layers are."""

    def prepare(
        self, plans: Sequence[Plan], *, until: float = float("inf"), on_done: Callable[[], None] = lambda: None
    ) -> None:
        """Compile what is going to be measured, so that measuring is not disturbed; a failure is kept for later."""
        ...

    def steps(self, plans: Sequence[Plan]) -> int:
        """How often `prepare` will call `on_done`."""
        ...

    def gemm(self, workload: Workload, gemm: str, config: KernelConfig) -> float:
        """Seconds of one GEMM; raises what is wrong with the candidate."""
        ...

    def layer(self, workload: Workload, pair: Pair) -> Timing:
        """A brief timing of a call of the layer; raises what is wrong with the pair."""
        ...

    def final(self, workload: Workload, pairs: Sequence[Pair]) -> list[Timing]:
        """Timings of layers that were measured before, interleaved: their samples are paired."""
        ...


@dataclass(frozen=True)
class Plan:
    """What a search is going to measure.

    Attributes:
        workload: the layer, its tokens and routing.
        w13: candidates of the first GEMM.
        w2: candidates of the second.
    """

    workload: Workload
    w13: tuple[KernelConfig, ...]
    w2: tuple[KernelConfig, ...]

    def candidates(self, gemm: str) -> tuple[KernelConfig, ...]:
        """Of the GEMM `w13` or `w2`."""
        return self.w13 if gemm == "w13" else self.w2


def is_device_fault(message: str) -> bool:
    """Whether an error says that the device takes no more work from this process."""
    return any(fault in message for fault in _DEVICE_FAULTS)


class InProcess:
    """Measures in this process.

    Args:
        device: where.
        experts: the layer; it must follow `use_kernel_configs`. None: `fused_experts`, on Triton where that runs.
        bank: weights to share with other measurements.
    """

    def __init__(
        self, device: torch.device | str, experts: ExpertsCall | None = None, bank: WeightBank | None = None
    ) -> None:
        device = torch.device(device)
        self._device = torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
        self.times_gemms = Platform.of(self._device).runs_triton
        # The oracle may prefer another backend here, for which these tiles are not.
        self._experts = experts or (partial(fused_experts, backend="triton") if self.times_gemms else fused_experts)
        self._bank = bank
        self._prepared: _Prepared | None = None
        self._is_broken = False

    def prepare(
        self, plans: Sequence[Plan], *, until: float = float("inf"), on_done: Callable[[], None] = lambda: None
    ) -> None:
        """Nothing: a candidate is compiled when it is measured."""

    def steps(self, plans: Sequence[Plan]) -> int:
        """None."""
        return 0

    def gemm(self, workload: Workload, gemm: str, config: KernelConfig) -> float:
        """Seconds of one GEMM of one call: the median of a few rounds.

        Raises:
            WrongKernelError: its result is wrong.
            Exception: whatever the compiler or the launch raises.
        """
        with self._guard():
            prepared = self._prepare(workload)
            calls = prepared.gemm_calls(gemm, config)
            prepared.expect_right_gemm(gemm, calls[0])
            return self._brief(calls).median

    def layer(self, workload: Workload, pair: Pair) -> Timing:
        """A few samples of a call of the layer. Raises as `gemm`."""
        with self._guard():
            operands = self._prepare(workload).operands
            with use_kernel_configs(*pair):
                out = operands[0].pass_to(self._experts)
            stored = workload.format
            verdict = judge_rows(out, self._prepare(workload).right, stored.activations, stored.scheme)
            expect_right("candidate", "its result", verdict)
            return self._brief(self._layer_calls(pair, operands))

    def final(self, workload: Workload, pairs: Sequence[Pair]) -> list[Timing]:
        """Samples of each pair's layer, interleaved."""
        with self._guard():
            operands = self._prepare(workload).operands
            passes = {str(i): self._capture(self._layer_calls(pair, operands)) for i, pair in enumerate(pairs)}
            rounds = choose_rounds(passes, self._clock, budget=_FINAL_SECONDS, most=_FINAL_ROUNDS)
            samples = interleave(passes, self._clock, rounds=rounds)
            return [Timing(tuple(s / len(operands) for s in samples[str(i)])) for i in range(len(pairs))]

    @property
    def _clock(self) -> CudaClock | HostClock:
        return CudaClock(self._device) if self._device.type == "cuda" else HostClock()

    def _guard(self) -> _Guard:
        if self._is_broken:
            raise CandidateError("not tried: an earlier candidate broke the device")
        return _Guard(self, torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext())

    def _prepare(self, workload: Workload) -> _Prepared:
        if self._prepared is None or self._prepared.workload != workload:
            self._prepared = None  # the last workload's memory goes first
            if self._bank is None or not self._bank.serves(workload, self._device):
                self._bank = None
                self._bank = WeightBank(workload.model, workload.format, self._device)
            rotation = plan_rotation(
                workload,
                l2_bytes(self._device),
                multiple=_MULTIPLE,
                max_copies=min(16, self._bank.room_for(workload)),
                min_calls=None if self._device.type == "cuda" else 4,
            )
            operands = [
                make_operands(workload, self._bank, call, rotation.copy_of(call)) for call in range(rotation.calls)
            ]
            self._prepared = _Prepared(workload, operands)
        return self._prepared

    def _layer_calls(self, pair: Pair, operands: Sequence[Operands]) -> list[Callable[[], torch.Tensor]]:
        def call(each: Operands) -> torch.Tensor:
            with use_kernel_configs(*pair):
                return each.pass_to(self._experts)

        return [partial(call, each) for each in operands]

    def _capture(self, calls: Sequence[Callable[[], torch.Tensor]]) -> Callable[[], object]:
        return (capture_graph if self._device.type == "cuda" else one_after_another)(list(calls), self._device).run

    def _brief(self, calls: Sequence[Callable[[], torch.Tensor]]) -> Timing:
        samples = interleave({"": self._capture(calls)}, self._clock, rounds=_BRIEF_ROUNDS)[""]
        return Timing(tuple(sample / len(calls) for sample in samples))


class _Guard:
    """On the device; a fault of the device is remembered."""

    def __init__(self, bench: InProcess, inner: AbstractContextManager[Any]) -> None:
        self._bench, self._inner = bench, inner

    def __enter__(self) -> None:
        self._inner.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and is_device_fault(str(error)):
            self._bench._is_broken = True
        self._inner.__exit__(kind, error, trace)


@dataclass
class _Prepared:
    """A workload's tensors: those of the layer, and of each GEMM once it is asked for."""

    workload: Workload
    operands: list[Operands]
    _right: torch.Tensor | None = None
    _gemms: dict[str, _Gemm] = field(default_factory=dict)
    _assignments: dict[int, list[ExpertAssignment]] = field(default_factory=dict)

    @property
    def right(self) -> torch.Tensor:
        """The first call's result, `[M, H]`."""
        if self._right is None:
            self._right = plain_experts(self.operands[0])
        return self._right

    def gemm_calls(self, gemm: str, config: KernelConfig) -> list[Callable[[], torch.Tensor]]:
        """One GEMM of each call of the rotation, without what comes before and after it."""
        data = self._gemm(gemm)
        assignments = self._assign(config.block_size_m)
        is_first = gemm == "w13"

        def call(each: Operands, rows: StoredRows, assignment: ExpertAssignment) -> torch.Tensor:
            values, scales = rows
            grouped_gemm(
                data.c,
                values,
                _gemm_operands(each, is_first, scales),
                topk_ids=each.topk_ids,
                topk_weights=each.topk_weights,
                mul_weight=not is_first,
                sorted_token_ids=assignment.sorted_token_ids,
                expert_ids=assignment.expert_ids,
                a_row_is_token=is_first,
                allow_tf32=False,
                config=config,
            )
            return data.c

        return [partial(call, *each) for each in zip(self.operands, data.a, assignments, strict=True)]

    def expect_right_gemm(self, gemm: str, call: Callable[[], torch.Tensor]) -> None:
        """Run the first call, and let nothing wrong be timed.

        What is right is worked out of the very rows and weights that the GEMM reads, quantised or not. So however they
        are stored its error is that of sums in float32 and of the output's dtype.

        Raises:
            WrongKernelError: a row is wrong, or was not written.
        """
        data = self._gemm(gemm)
        data.c.fill_(float("nan"))
        out = call()
        verdict = judge_rows(out if data.rows is None else out[data.rows], data.right, out.dtype)
        expect_right("candidate", f"its {gemm} GEMM", verdict)

    def _assign(self, block_size: int) -> list[ExpertAssignment]:
        if block_size not in self._assignments:
            model = self.workload.model
            self._assignments[block_size] = [
                prepare_expert_assignment(
                    each.topk_ids,
                    block_size=block_size,
                    num_local_experts=model.local_experts,
                    global_num_experts=model.num_experts,
                    expert_map=each.expert_map,
                    scheme=self.workload.format.scheme,
                    block_shape=self.workload.format.block_shape,
                )
                for each in self.operands
            ]
        return self._assignments[block_size]

    def _gemm(self, gemm: str) -> _Gemm:
        if gemm not in self._gemms:
            self._gemms.clear()  # one at a time: they are large where there are many tokens
            operands = self.operands[0]
            x, quant = operands.hidden_states, operands.quant
            a = [_as_stored(each.hidden_states, quant) for each in self.operands]
            right = _plain_first_gemm(operands, a[0])
            if gemm == "w2":
                gate, up = right.chunk(2, dim=1)
                activated = _as_stored((torch.nn.functional.silu(gate) * up).to(x.dtype), quant)
                a = [activated] * len(self.operands)
                right = _plain_second_gemm(operands, activated)
            local = _local_ids(operands) >= 0
            rows = None if bool(local.all()) else torch.where(local)[0]
            c = torch.empty((local.numel(), gemm_sizes(self.workload, gemm)[0]), dtype=x.dtype, device=x.device)
            self._gemms[gemm] = _Gemm(a, c, right if rows is None else right[rows], rows)
        return self._gemms[gemm]


StoredRows = tuple[torch.Tensor, torch.Tensor | None]
"""Rows as a GEMM reads them, and their scales where they are quantised."""


@dataclass(frozen=True)
class _Gemm:
    """Tensors that all candidates of a GEMM share.

    Attributes:
        a: the input of each call: `[M, H]` of the first GEMM; `[M * top_k, I]` of the second, where every call reads
            the same rows, as in a layer they have just been written.
        c: `[M * top_k, N]`, the output.
        right: what the first call must give, the rows of this rank's pairs alone.
        rows: which rows of `c` those are; None: all.
    """

    a: list[StoredRows]
    c: torch.Tensor
    right: torch.Tensor
    rows: torch.Tensor | None


def _local_ids(operands: Operands) -> torch.Tensor:
    """`[M * top_k]`: the local expert of each pair, -1 for another rank's."""
    ids = operands.topk_ids.long().flatten()
    return ids if operands.expert_map is None else operands.expert_map.long()[ids]


def _as_stored(rows: torch.Tensor, quant: ExpertsQuantization | None) -> StoredRows:
    """`rows [rows, K]` as the layer gives them to a GEMM."""
    if quant is None or quant.activation_dtype is None:
        return rows, None
    return quantize_activations(rows, quant.activation_dtype, quant.activation_scale, group=quant.group)


def _gemm_operands(weights: Operands | LayerWeights, is_first: bool, scales: torch.Tensor | None) -> GemmOperands:
    """A GEMM's weights, with the scales of its rows."""
    w = weights.w13 if is_first else weights.w2
    # The grid of scales starts anew at the first up row.
    return gemm_operands(w, None, weights.quant, is_w13=is_first, parts=2 if is_first else 1, a_scale=scales)


def _plain_grouped(operands: Operands, name: str, stored: StoredRows, rows_of_pairs: torch.Tensor) -> torch.Tensor:
    """`[pairs, N]` in float32 (float64 for float32 operands): each pair's row times its expert's `w13` or `w2`.

    A pair without an expert here is zero.
    """
    precise = torch.float64 if operands.hidden_states.dtype == torch.float32 else torch.float32
    group = 0 if operands.quant is None else operands.quant.group
    rows, experts = plain_rows(*stored, group), _local_ids(operands)
    out = torch.zeros((experts.numel(), getattr(operands, name).shape[1]), dtype=precise, device=rows.device)
    for expert in torch.unique(experts[experts >= 0]).tolist():
        pairs = torch.where(experts == expert)[0]
        out[pairs] = rows[rows_of_pairs[pairs]].to(precise) @ plain_weight(operands, name, expert, precise).T
    return out


def _plain_first_gemm(operands: Operands, stored: StoredRows) -> torch.Tensor:
    num_tokens, top_k = operands.topk_ids.shape
    tokens = torch.arange(num_tokens, device=operands.topk_ids.device).repeat_interleave(top_k)
    return _plain_grouped(operands, "w13", stored, tokens)


def _plain_second_gemm(operands: Operands, stored: StoredRows) -> torch.Tensor:
    pairs = torch.arange(operands.topk_ids.numel(), device=operands.topk_ids.device)
    out = _plain_grouped(operands, "w2", stored, pairs)
    return out * operands.topk_weights.flatten()[:, None].to(out.dtype)


class Remote:
    """Measures in one process of its own, and compiles in many; both kinds are started once for the whole search.

    Args:
        device: where.
        processes: that compile; None: as cores allow.
    """

    def __init__(self, device: torch.device, processes: int | None = None) -> None:
        self._device = str(device)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        size = processes or min(_MOST_PROCESSES, max(1, cores - 2))
        self._compilers = WorkerPool(size, is_device_fault)
        self._measurer = WorkerPool(1, is_device_fault)
        self._failed: dict[tuple[Any, ...], str] = {}
        self.times_gemms = True

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._compilers.close()
        self._measurer.close()

    def steps(self, plans: Sequence[Plan]) -> int:
        """How many things there are to compile."""
        return len(self._layer_jobs(plans)) + len(self._gemm_jobs(plans))

    def prepare(
        self, plans: Sequence[Plan], *, until: float = float("inf"), on_done: Callable[[], None] = lambda: None
    ) -> None:
        """Compile all variants of all plans side by side, each once, whatever models and tokens share it."""
        layers, gemms = self._layer_jobs(plans), self._gemm_jobs(plans)
        # The layers first, which are the long ones. Where one fails nothing is lost: measuring will say why.
        jobs = [*layers, *gemms.values()]
        outcomes = self._compilers.run(jobs, limit=_COMPILE_LIMIT, until=until, on_done=on_done)
        for key, outcome in zip(gemms, outcomes[len(layers) :], strict=True):
            if outcome.error and not outcome.error.startswith((NOT_TRIED, "OutOfMemoryError")):
                self._failed[key] = f"compiling: {outcome.error}"
        self._compilers.close()  # they hold memory of the device, and the cache on disk has what they made

    def gemm(self, workload: Workload, gemm: str, config: KernelConfig) -> float:
        """Seconds of one GEMM.

        Raises:
            CandidateError: it failed, now or when it was compiled.
        """
        known = self._failed.get(gemm_variant(workload, gemm, config))
        if known:
            raise CandidateError(known)
        return self._ask("gemm", workload, gemm, config)

    def layer(self, workload: Workload, pair: Pair) -> Timing:
        """A brief timing of a layer.

        Raises:
            CandidateError: it failed.
        """
        return self._ask("layer", workload, pair)

    def final(self, workload: Workload, pairs: Sequence[Pair]) -> list[Timing]:
        """Timings of layers, interleaved.

        Raises:
            CandidateError: one failed.
        """
        return self._ask("final", workload, list(pairs))

    def _ask(self, method: str, *arguments: Any) -> Any:
        outcome = self._measurer.ask(_measure, self._device, method, arguments, limit=_MEASURE_LIMIT)
        if outcome.error:
            raise CandidateError(outcome.error)
        return outcome.value

    def _gemm_jobs(self, plans: Sequence[Plan]) -> dict[tuple[Any, ...], Job]:
        jobs: dict[tuple[Any, ...], Job] = {}
        for plan in plans:
            for gemm in GEMMS:
                for config in plan.candidates(gemm):
                    variant = gemm_variant(plan.workload, gemm, config)
                    jobs.setdefault(variant, (_compile_gemm, (self._device, plan.workload, gemm, config)))
        return jobs

    def _layer_jobs(self, plans: Sequence[Plan]) -> list[Job]:
        found: dict[tuple[Model, str, int], list[tuple[Workload, Pair]]] = {}
        for plan in plans:
            for block_m in dict.fromkeys(config.block_size_m for config in plan.w13):
                pair = [
                    next((c for c in configs if c.block_size_m == block_m), None) for configs in (plan.w13, plan.w2)
                ]
                if pair[0] is not None and pair[1] is not None:
                    group = found.setdefault((plan.workload.model, plan.workload.dtype, block_m), [])
                    group.append((plan.workload, (pair[0], pair[1])))
        return [(_compile_layers, (self._device, layers)) for layers in found.values()]


def gemm_variant(workload: Workload, gemm: str, config: KernelConfig) -> tuple[Any, ...]:
    """What the grouped GEMM's compiled form depends on: workloads that agree in it share one."""
    n, k = gemm_sizes(workload, gemm)
    scale_n, _ = workload.format.block_shape or (0, 0)
    grid = workload.model.intermediate_size if gemm == "w13" else n  # rows that share a grid of scales
    return (
        workload.dtype,
        _is_naive(workload),
        n % config.block_size_n == 0,
        k % config.block_size_k == 0,
        # Triton specialises sizes and strides on being 1, and on being divisible by 16.
        *(1 if size == 1 else size % 16 == 0 for size in (n, k, n * k)),
        k * config.block_size_n >= 2**31,
        scale_n > 0 and scale_n % config.block_size_n == 0 and grid % config.block_size_n == 0,
        config,
    )


def _is_naive(workload: Workload) -> bool:
    model = workload.model
    return uses_naive_block_assignment(
        num_tokens=workload.num_tokens,
        top_k=model.top_k,
        global_num_experts=model.num_experts,
        has_expert_map=model.local_experts != model.num_experts,
        scheme=workload.format.scheme,
        block_shape=workload.format.block_shape,
    )


_benches: dict[str, InProcess] = {}


def _measure(device: str, method: str, arguments: tuple[Any, ...]) -> Any:
    """In the measuring process: a method of its bench."""
    if device not in _benches:
        _benches[device] = InProcess(device)
    return getattr(_benches[device], method)(*arguments)


def _on(device: str) -> torch.device:
    where = torch.device(device)
    if where.type == "cuda":
        if where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(where)
    return where


def _one_expert(workload: Workload, device: torch.device) -> LayerWeights:
    """The weights of a layer of one expert."""
    model = replace(workload.model, num_experts=1, num_local_experts=None, top_k=1)
    return WeightBank(model, workload.format, device).copy(0)


def _shared_by(weights: LayerWeights, num_experts: int) -> LayerWeights:
    """One expert's weights as those of so many experts; scales, which must be dense, are copied."""

    def of_all(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(num_experts, *tensor.shape[1:])

    quant = weights.quant
    if quant is not None:
        scales = (quant.w13_scale, quant.w2_scale)
        w13_scale, w2_scale = (of_all(scale).contiguous() for scale in scales)
        quant = replace(quant, w13_scale=w13_scale, w2_scale=w2_scale)
    return replace(weights, w13=of_all(weights.w13), w2=of_all(weights.w2), quant=quant)


def _compile_gemm(device: str, workload: Workload, gemm: str, config: KernelConfig) -> None:
    """In a compiling process: launch a candidate once on one expert and one token, with the workload's strides."""
    where = _on(device)
    n, k = gemm_sizes(workload, gemm)
    top_k, stored = workload.model.top_k, workload.format
    is_first = gemm == "w13"
    weights = _one_expert(workload, where)
    num_rows, scales = 1 if is_first else top_k, None
    if weights.quant is not None:
        scales = torch.ones((num_rows, cdiv(k, weights.quant.group)), dtype=torch.float32, device=where)
    naive = _is_naive(workload)
    slots = torch.full((config.block_size_m * -(-top_k // config.block_size_m),), top_k, dtype=torch.int32)
    slots[:top_k] = torch.arange(top_k)
    blocks = torch.zeros(slots.numel() // config.block_size_m, dtype=torch.int32)
    grouped_gemm(
        torch.empty((top_k, n), dtype=stored.activations, device=where),
        torch.zeros((num_rows, k), dtype=stored.operand_dtype, device=where),
        _gemm_operands(weights, is_first, scales),
        topk_ids=torch.zeros((1, top_k), dtype=torch.int32, device=where),
        topk_weights=torch.ones((1, top_k), dtype=torch.float32, device=where),
        mul_weight=not is_first,
        sorted_token_ids=None if naive else slots.to(where),
        expert_ids=None if naive else blocks.to(where),
        a_row_is_token=is_first,
        allow_tf32=False,
        config=config,
    )
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def _compile_layers(device: str, layers: Sequence[tuple[Workload, Pair]]) -> None:
    """In a compiling process: run layers of one model whose experts all share one weight, for the kernels around."""
    where = _on(device)
    model, stored = layers[0][0].model, layers[0][0].format
    weights = _shared_by(_one_expert(layers[0][0], where), model.local_experts)
    expert_map = model.expert_map()
    for workload, pair in layers:
        shape = (workload.num_tokens, model.top_k)
        ids = torch.arange(workload.num_tokens * model.top_k, dtype=torch.int32, device=where) % model.num_experts
        with use_kernel_configs(*pair):
            fused_experts(
                torch.zeros((workload.num_tokens, model.hidden_size), dtype=stored.activations, device=where),
                weights.w13,
                weights.w2,
                torch.ones(shape, dtype=torch.float32, device=where),
                ids.view(shape),
                activation=model.activation,
                expert_map=None if expert_map is None else expert_map.to(where),
                global_num_experts=model.num_experts,
                quant=weights.quant,
                backend="triton",
            )
        if where.type == "cuda":
            torch.cuda.synchronize(where)
