"""META: laws that relate two calls. They need no reference, so they also hold the reference to account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...reference.experts import Trace
from ...reference.quantization import expert_weight
from ..arena import Arena
from ..budget import Budget
from ..calibration import limits
from ..cases import ExpertsCase
from ..evidence import evidence_of
from ..judge import Property, Verdict, declare
from ..numerics import Numerics
from ..spec import SCHEMES, ExpertsSpec
from ..stored import StoredExperts

PERMUTED = declare("META-01", "tokens in another order give the same rows in that order", "experts")
RELABELLED = declare(
    "META-02", "experts under other ids, with routing and weights renamed alike, give the same output", "experts"
)
SPLIT = declare("META-03", "a batch in two parts gives the rows of the whole", "experts")
LINEAR = declare("META-04", "twice the routing weights give twice the output", "experts", is_value=True)
DENSE = declare("META-05", "with top_k = E the output is the dense mixture of all experts", "experts", is_value=True)
REMOVABLE = declare(
    "META-06",
    "an expert with routing weight zero may as well be absent",
    "experts",
    # It is made absent by an id of -1.
    needs=lambda can: "one_zero" in can.weights and "some_invalid" in can.routings,
)
DUPLICATE = declare("META-07", "a duplicated token gets an equal row", "experts")
SHARDS = declare(
    "META-08",
    "the outputs of two ranks that share the experts sum to the whole",
    "experts",
    needs=lambda can: set(can.maps) != {"none"},
)
DOUBLED = declare(
    "META-09",
    "the second GEMM's weights, or their scales, and its bias times two give twice the output",
    "experts",
)

WIDER_IDS = declare(
    "META-10",
    "ids of int64 give the bits of ids of int32",
    "experts",
    needs=lambda can: "int64" in can.id_dtypes,
)

Run = Callable[[ExpertsCase], Tensor]
"""The subject, on a case."""


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        property: whose verdict it gives.
        applies: whether a spec's case can state it.
        adapt: the spec that the case is built from; most laws take what was drawn.
        judge: runs the subject as often as it needs, given the first output with its reference.
        runs: how often it calls the subject, the first call included.
        examples: cases that the gate draws.
        is_of_ids: what computes the experts is not its point: where kernels are compiled, plain layers will do.
    """

    property: Property
    judge: Callable[[ExpertsCase, Tensor, Trace, Budget, Numerics, Run], Verdict | None]
    applies: Callable[[ExpertsSpec], bool] = lambda spec: spec.M > 0
    adapt: Callable[[ExpertsSpec], ExpertsSpec] = lambda spec: spec
    runs: int = 2
    examples: int = 60
    is_of_ids: bool = False


def placed(case: ExpertsCase, **operands: Any) -> ExpertsCase:
    """The case with other operands, those too in hostile memory, and the scales among them."""
    arena = Arena()

    def place(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return arena.place(name, value.contiguous())
        if isinstance(value, StoredExperts):
            return replace(value, **{part: place(part, t) for part, t in value.tensors().items()})
        return value

    return replace(case, arena=arena, **{name: place(name, value) for name, value in operands.items()})


def _own_scales(spec: ExpertsSpec) -> bool:
    """Whether no scale of the activations depends on other tokens or experts."""
    return SCHEMES[spec.scheme].activation_scale != "tensor"


def agree(
    prop: Property, got: Tensor, expected: Tensor, budget: Budget, *, times: float = 1.0, exact: bool = False
) -> Verdict:
    """Both outputs honest: their difference within `times` the quadrature sum of two budgets, or bit-equal."""
    if exact:
        differ = got != expected
        return prop.verdict(not differ.any(), f"{int(differ.sum())} elements differ, declared equal to the bit")
    if got.numel() == 0:
        return prop.verdict(True)
    allowed = times * (limits(budget.is_quantized).elementwise * 2**0.5 * budget.sigma + 2 * budget.last)
    error = (got.double() - expected.double()).abs().nan_to_num(torch.inf)
    used = torch.where(error == 0, 0.0, error / allowed)
    evidence = evidence_of(got, expected, used)
    return prop.verdict((used <= 1).all(), evidence.text(), budget_used=float(used.max()), evidence=evidence)


def _permuted(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    order = torch.arange(case.num_tokens, device=out.device).flip(0).roll(1)
    moved = placed(
        case,
        hidden_states=case.hidden_states[order],
        topk_weights=case.topk_weights[order],
        topk_ids=case.topk_ids[order],
    )
    return agree(PERMUTED, run(moved)[order.argsort()], out, budget, exact=numerics.permutation_invariant)


def _relabelled(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    num_experts = case.num_experts
    new_id = torch.arange(num_experts, device=out.device).flip(0)
    ids = torch.where(case.topk_ids < 0, case.topk_ids.long(), new_id[case.topk_ids.long().clamp(min=0)])
    if case.expert_map is None:
        renamed = placed(case, topk_ids=ids.int(), **case.layer_of_experts(new_id))
    else:
        renamed = placed(case, topk_ids=ids.int(), expert_map=case.expert_map.flip(0))
    return agree(RELABELLED, run(renamed), out, budget)


def _split(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    at = case.num_tokens // 2
    parts = [
        run(
            placed(
                case,
                hidden_states=case.hidden_states[rows],
                topk_weights=case.topk_weights[rows],
                topk_ids=case.topk_ids[rows],
            )
        )
        for rows in (slice(0, at), slice(at, None))
        if case.topk_ids[rows].numel()
    ]
    return agree(SPLIT, torch.cat(parts), out, budget)


def _linear(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    doubled = run(placed(case, topk_weights=2 * case.topk_weights))
    return agree(LINEAR, doubled, 2 * out.double(), budget, times=2.0)


def _doubled(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    changed: dict[str, Any] = {} if case.w2_bias is None else {"w2_bias": 2 * case.w2_bias}
    if case.stored is None:
        changed["w2"] = 2 * case.w2
    else:
        changed["stored"] = replace(case.stored, w2_scale=2 * case.stored.w2_scale)
    doubled = run(placed(case, **changed))
    return agree(DOUBLED, doubled, 2 * out.double(), budget, times=2.0)


def _dense(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    # The dense mixture, written without any routing: every token through every expert, as one product each.
    layer = case.layer()
    bias_13, bias_2 = layer["w13_bias"], layer["w2_bias"]
    x = case.hidden_states.double()
    x = x if layer["quantize_input"] is None else layer["quantize_input"].rounded(x)
    experts = range(case.num_local_experts)
    hidden = []
    for expert in experts:
        rows = x @ expert_weight(layer["w13"], expert, x.dtype).T + (0 if bias_13 is None else bias_13[expert])
        hidden.append(case.activation(*case.activation.split(rows)))
    h = torch.cat(hidden)
    h = h if layer["quantize_hidden"] is None else layer["quantize_hidden"].rounded(h)
    dense = torch.zeros_like(x)
    for expert, rows in zip(experts, h.split(case.num_tokens), strict=True):
        weight = (case.topk_weights.double() * (case.topk_ids == expert)).sum(dim=1, keepdim=True)
        y = rows @ expert_weight(layer["w2"], expert, x.dtype).T + (0 if bias_2 is None else bias_2[expert])
        dense += weight * y
    return agree(DENSE, out, dense, budget)


def _removable(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    ids = case.topk_ids.clone()
    ids[:, 0] = -1
    return agree(REMOVABLE, run(placed(case, topk_ids=ids)), out, budget)


def _duplicate(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    def with_copy(t: Tensor) -> Tensor:
        return torch.cat([t, t[:1]])

    longer = run(
        placed(
            case,
            hidden_states=with_copy(case.hidden_states),
            topk_weights=with_copy(case.topk_weights),
            topk_ids=with_copy(case.topk_ids),
        )
    )
    return agree(DUPLICATE, longer[-1:], longer[:1], budget.first_rows(1), exact=numerics.permutation_invariant)


def _shards(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    num_experts = case.num_experts
    total = torch.zeros_like(out, dtype=torch.float64)
    for rank in range(2):
        owned = torch.arange(num_experts, device=out.device)[rank::2]
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32, device=out.device)
        expert_map[owned] = torch.arange(len(owned), dtype=torch.int32, device=out.device)
        total += run(placed(case, expert_map=expert_map, **case.layer_of_experts(owned))).double()
    # Each shard's last rounding is of a partial sum, which may exceed the whole.
    partial = (trace.output_weights[..., None] * trace.expert_output).abs().sum(dim=1)
    roundoff = torch.finfo(out.dtype).eps / 2
    wider = replace(budget, sigma=(budget.sigma**2 + 2 * (roundoff * partial) ** 2).sqrt(), last=1.5 * budget.last)
    return agree(SHARDS, total, out, wider)


def _wider_ids(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    return agree(WIDER_IDS, run(placed(case, topk_ids=case.topk_ids.long())), out, budget, exact=numerics.repeatable)


LAWS = (
    Law(PERMUTED, _permuted),
    Law(RELABELLED, _relabelled),
    Law(SPLIT, _split, applies=lambda spec: spec.M > 0 and _own_scales(spec), runs=3),
    Law(LINEAR, _linear, applies=lambda spec: spec.M > 0, adapt=lambda spec: replace(spec, weight_on_input=False)),
    Law(
        DENSE,
        _dense,
        applies=lambda spec: spec.M > 0 and spec.E <= 8,
        adapt=lambda spec: replace(
            spec, E=min(spec.E, 8), top_k=min(spec.E, 8), expert_map="none", weight_on_input=False, routing="uniform"
        ),
        runs=1,
    ),
    Law(
        REMOVABLE,
        _removable,
        applies=lambda spec: spec.M > 0 and _own_scales(spec),
        adapt=lambda spec: replace(spec, weights="one_zero", weight_on_input=False),
    ),
    Law(DUPLICATE, _duplicate),
    Law(DOUBLED, _doubled),
    Law(WIDER_IDS, _wider_ids, examples=12, is_of_ids=True),
    Law(
        SHARDS,
        _shards,
        applies=lambda spec: spec.M > 0 and spec.E > 1 and _own_scales(spec),
        adapt=lambda spec: replace(spec, expert_map="none"),
        runs=3,
    ),
)
