"""LORA: adapters on experts. A row has its own adapter and nothing of any other, of an earlier batch, or of none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...reference.experts import Trace
from ..budget import experts_budget
from ..calibration import limits
from ..cases import ExpertsCase
from ..evidence import evidence_of
from ..judge import Verdict, declare
from ..lora_cases import LoraAdapter, LoraCase, LoraMatrix
from ..numerics import Numerics

BASE = declare("LORA-01", "a row without an adapter has the bits of the layer without LoRA", "lora")
ELEMENT = declare(
    "LORA-02", "every element is within its error budget of the float64 layer with adapters", "lora", is_value=True
)
OTHERS = declare(
    "LORA-03",
    "changing one adapter, to NaN or to the largest number where that is refused, changes no bit of another's rows",
    "lora",
)
SLOTS = declare("LORA-04", "in whatever slots and order adapters are loaded, every row keeps its bits", "lora")
TOKENS = declare("LORA-05", "tokens in another order, ids with them, are within budget of their rows", "lora")
NO_TRACE = declare("LORA-06", "a batch without adapters behind one with them has the bits of the layer alone", "lora")
SHARDS = declare(
    "LORA-07",
    "the outputs of two ranks that share the experts, each with its own experts' adapters, sum to the whole",
    "lora",
    needs=lambda can: set(can.maps) != {"none"},
)
ZERO = declare("LORA-08", "an adapter whose B is zero, or that adapts nothing, changes no value", "lora")
RELOADED = declare("LORA-09", "what an evicted adapter left in its slot reaches no row of the next", "lora")
MEMORY = declare("LORA-10", "no operand is written, and the same call gives the same bits", "lora")
HISTORY = declare(
    "LORA-11", "after any history of loads, evictions and batches a call is that of a fresh table", "lora"
)
REFUSED = declare("LORA-12", "a bad adapter or id is refused by name, and the table is as it was", "lora")
DECISION = declare(
    "LORA-13", "with adapters the oracle takes Triton, batched_triton in the batched format", "lora", "oracle"
)
REPLAYED = declare(
    "LORA-14",
    "a captured graph, replayed with other adapters and ids, equals the eager call",
    "lora",
    devices=("cuda",),
)


class LoraLayer(Protocol):
    """A layer of the subject with slots for adapters, as a facet `lora` returns it."""

    def load(self, slot: int, adapter: LoraAdapter) -> None:
        """Put an adapter into a slot, over what it holds."""

    def evict(self, slot: int) -> None:
        """Empty a slot."""

    def run(self, lora_ids: Tensor | None) -> Tensor:
        """The layer's output, shaped as hidden_states; None: a batch that is known to have no adapter."""
        ...


Make = Callable[[LoraCase, int], LoraLayer]
"""The subject's layer of a case, with that many slots, all empty."""


def loaded(make: Make, case: LoraCase, slots: tuple[int, ...] | None = None) -> LoraLayer:
    """The layer with the case's adapters in the slots of their ids, or in those given."""
    count = len(case.adapters)
    places = tuple(range(count)) if slots is None else slots
    layer = make(case, max(places) + 1)
    for slot, adapter in zip(places, case.adapters, strict=True):
        layer.load(slot, adapter)
    return layer


def differing_rows(case: LoraCase, a: Tensor, b: Tensor, which: Tensor | None = None) -> int:
    """Of the rows of tokens (some of them) how many differ in a bit."""
    first, second = case.rows(a), case.rows(b)
    if which is not None:
        first, second = first[which], second[which]
    if not first.numel():
        return 0
    return int((first.contiguous().view(torch.uint8) != second.contiguous().view(torch.uint8)).any(dim=-1).sum())


def rows_are_apart(case: LoraCase) -> bool:
    """Whether a row's bits are its own: one dynamic scale of the whole tensor hangs on every row's adapter."""
    return case.layer.activation_scale != "tensor"


@dataclass(frozen=True)
class LoraTruth:
    """The reference's rows of tokens and what they may be off: `[tokens, H]` each."""

    output: Tensor
    sigma: Tensor
    last: Tensor
    is_quantized: bool
    trace: Trace

    def used(self, rows: Tensor) -> Tensor:
        """Error over budget of each element."""
        error = (rows.to(self.output.dtype) - self.output).nan_to_num(torch.inf, torch.inf, torch.inf).abs()
        beyond = (error - self.last).clamp(min=0)
        return torch.where(beyond == 0, 0.0, beyond / self.sigma) / limits(self.is_quantized).elementwise


def truth_of(case: LoraCase, numerics: Numerics) -> LoraTruth:
    """What the reference says, and the budget around it."""
    if case.is_batched:
        numerics = replace(numerics, weighted="float32", combine="float32", routing_weight="float32")
    call = case.operands()
    trace = call.trace()
    budget = experts_budget(trace, call, numerics)
    return LoraTruth(trace.output, budget.sigma, budget.last, budget.is_quantized, trace)


def judge_element(case: LoraCase, output: Tensor, truth: LoraTruth) -> list[Verdict]:
    """LORA-02; nothing for a case without tokens."""
    rows, ids = case.rows(output), case.rows(case.lora_ids)
    if not rows.numel():
        return []
    used = truth.used(rows)
    found = evidence_of(rows, truth.output, used, trace=truth.trace)
    detail = f"adapter {int(ids[found.token])}, {found.text()}"
    holds = bool((used <= 1).all())
    return [ELEMENT.verdict(holds, detail, budget_used=float(used.max()), evidence=found)]


def judge_base(case: LoraCase, layer: LoraLayer, output: Tensor) -> list[Verdict]:
    """LORA-01 and 06: rows of -1 in this batch, then a batch of -1 alone, and one that is known to have none."""
    plain = layer.run(None)
    none = (case.rows(case.lora_ids) < 0) & rows_are_apart(case)
    stray = differing_rows(case, output, plain, none)
    after = differing_rows(case, layer.run(torch.full_like(case.lora_ids, -1)), plain)
    return [
        BASE.verdict(not stray, f"{stray} of {int(none.sum())} rows without an adapter differ from the layer alone"),
        NO_TRACE.verdict(not after, f"{after} rows of a batch of -1 differ from the layer alone"),
    ]


def judge_zero(case: LoraCase, layer: LoraLayer, output: Tensor) -> list[Verdict]:
    """LORA-08, where the case's adapters are such."""
    if any(bool(m.b.any()) for a in case.adapters for part in vars(a).values() for m in part.values()):
        return []
    same = case.rows(output) == case.rows(layer.run(None))
    return [ZERO.verdict(bool(same.all()), f"{int((~same).sum())} elements differ from the layer alone")]


def _load_worst(layer: LoraLayer, slot: int, case: LoraCase, filled: Callable[[float], LoraAdapter]) -> None:
    """An adapter of NaN; of the largest finite number where the subject takes finite ones alone."""
    try:
        layer.load(slot, filled(torch.nan))
    except ValueError:
        layer.load(slot, filled(torch.finfo(case.layer.hidden_states.dtype).max))


def judge_others(case: LoraCase, layer: LoraLayer, output: Tensor) -> list[Verdict]:
    """LORA-03: the first adapter becomes NaN, or the largest number. The layer is left as it was."""
    _load_worst(layer, 0, case, case.adapters[0].changed)
    changed = layer.run(case.lora_ids)
    layer.load(0, case.adapters[0])
    if not rows_are_apart(case):
        return []
    others = case.rows(case.lora_ids) != 0
    stray = differing_rows(case, changed, output, others)
    return [OTHERS.verdict(not stray, f"{stray} of {int(others.sum())} rows of others differ")]


def judge_slots(case: LoraCase, make: Make, output: Tensor) -> list[Verdict]:
    """LORA-04: the adapters in another order, in slots with gaps, the largest id first."""
    count = len(case.adapters)
    slots = tuple(2 * (count - 1 - index) + 1 for index in range(count))
    layer = loaded(make, case, slots)
    ids = case.lora_ids.clone()
    for index, slot in enumerate(slots):
        ids[case.lora_ids == index] = slot
    stray = differing_rows(case, layer.run(ids), output)
    return [SLOTS.verdict(not stray, f"{stray} rows differ with adapters in slots {slots}")]


def judge_tokens(case: LoraCase, make: Make, truth: LoraTruth) -> list[Verdict]:
    """LORA-05, in the standard format."""
    if not isinstance(case.layer, ExpertsCase) or case.layer.num_tokens < 2:
        return []
    order = torch.arange(case.layer.num_tokens - 1, -1, -1, device=case.lora_ids.device)
    inner = case.layer
    moved = replace(
        inner,
        hidden_states=inner.hidden_states[order],
        topk_weights=inner.topk_weights[order],
        topk_ids=inner.topk_ids[order],
    )
    other = replace(case, layer=moved, lora_ids=case.lora_ids[order].contiguous())
    used = truth.used(loaded(make, other).run(other.lora_ids)[order])
    return [TOKENS.verdict(bool((used <= 1).all()), f"error over budget {float(used.max()):.3g}")]


def judge_shards(case: LoraCase, make: Make, numerics: Numerics) -> list[Verdict]:
    """LORA-07, for a layer that holds all experts: two ranks hold the even and the odd ones."""
    inner = case.layer
    if not isinstance(inner, ExpertsCase) or inner.expert_map is not None or inner.num_experts < 2:
        return []
    if not inner.num_tokens:
        return []
    total, variance, last = torch.zeros(()), torch.zeros(()), torch.zeros(())
    is_quantized = False
    for rank in (0, 1):
        held = torch.arange(rank, inner.num_experts, 2, device=inner.topk_ids.device)
        mapping = torch.full((inner.num_experts,), -1, dtype=torch.int32, device=held.device)
        mapping[held] = torch.arange(len(held), dtype=torch.int32, device=held.device)
        part = replace(case, layer=replace(inner, expert_map=mapping, **inner.layer_of_experts(held)))
        truth = truth_of(part, numerics)
        total = total + loaded(make, part).run(part.lora_ids).double().cpu() - truth.output.cpu()
        variance, last = variance + truth.sigma.cpu() ** 2, last + truth.last.cpu()
        is_quantized = is_quantized or truth.is_quantized
    beyond = (total.nan_to_num(torch.inf, torch.inf, torch.inf).abs() - last).clamp(min=0)
    used = torch.where(beyond == 0, 0.0, beyond / variance.sqrt()) / limits(is_quantized).elementwise
    return [SHARDS.verdict(bool((used <= 1).all()), f"error over budget {float(used.max()):.3g}")]


def judge_reloaded(case: LoraCase, make: Make, output: Tensor) -> list[Verdict]:
    """LORA-09: every slot held an adapter of the largest rank, of NaN or the like, for all experts, before."""
    layer = make(case, len(case.adapters))
    inner = case.layer
    h, i = (
        inner.hidden_states.shape[-1],
        inner.activation.split(inner.hidden_states.new_empty(1, inner.w13.shape[1]))[0].shape[1],
    )
    rank, like = case.max_rank, inner.hidden_states

    def worst(value: float) -> LoraAdapter:
        def filled(n: int, k: int) -> dict[int, LoraMatrix]:
            a, b = (torch.full(s, value, dtype=like.dtype, device=like.device) for s in ((rank, k), (n, rank)))
            return {e: LoraMatrix(a, b, 1.0) for e in range(case.num_experts)}

        return LoraAdapter(filled(i, h), filled(i, h) if inner.activation.is_gated else {}, {}, filled(h, i))

    for slot in range(len(case.adapters)):
        _load_worst(layer, slot, case, worst)
    layer.evict(len(case.adapters) - 1)
    for slot, adapter in enumerate(case.adapters):
        layer.load(slot, adapter)
    stray = differing_rows(case, layer.run(case.lora_ids), output)
    return [RELOADED.verdict(not stray, f"{stray} rows differ from those of a fresh table")]


def judge_memory(case: LoraCase, output: Tensor, again: Tensor, numerics: Numerics) -> list[Verdict]:
    """LORA-10."""
    written = case.changed()
    stray = differing_rows(case, output, again) if numerics.repeatable else 0
    return [MEMORY.verdict(not written and not stray, f"written: {written}; {stray} rows differ between two calls")]
