"""META: laws that relate two calls. They need no reference, so they also hold the reference to account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...reference.experts import Trace
from ..arena import Arena
from ..budget import Budget
from ..calibration import limits
from ..cases import ExpertsCase
from ..judge import Property, Verdict, declare
from ..numerics import Numerics
from ..spec import ExpertsSpec

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
    needs=lambda can: "one_zero" in can.weights,
)
DUPLICATE = declare("META-07", "a duplicated token gets an equal row", "experts")
SHARDS = declare(
    "META-08",
    "the outputs of two ranks that share the experts sum to the whole",
    "experts",
    needs=lambda can: set(can.maps) != {"none"},
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
    """

    property: Property
    judge: Callable[[ExpertsCase, Tensor, Trace, Budget, Numerics, Run], Verdict | None]
    applies: Callable[[ExpertsSpec], bool] = lambda spec: spec.M > 0
    adapt: Callable[[ExpertsSpec], ExpertsSpec] = lambda spec: spec
    runs: int = 2


def _placed(case: ExpertsCase, **operands: Tensor | None) -> ExpertsCase:
    """The case with other operands, those too in hostile memory."""
    arena = Arena()
    placed = {name: None if t is None else arena.place(name, t.contiguous()) for name, t in operands.items()}
    return replace(case, arena=arena, **placed)


def _agree(
    prop: Property, got: Tensor, expected: Tensor, budget: Budget, *, times: float = 1.0, exact: bool = False
) -> Verdict:
    """Both outputs honest: their difference within `times` the quadrature sum of two budgets, or bit-equal."""
    if exact:
        differ = got != expected
        return prop.verdict(not differ.any(), f"{int(differ.sum())} elements differ, declared equal to the bit")
    if got.numel() == 0:
        return prop.verdict(True)
    allowed = times * (limits().elementwise * 2**0.5 * budget.sigma + 2 * budget.last)
    error = (got.double() - expected.double()).abs().nan_to_num(torch.inf)
    used = torch.where(error == 0, 0.0, error / allowed)
    token, column = divmod(int(used.argmax()), got.shape[1])
    return prop.verdict(
        (used <= 1).all(),
        f"token {token}, column {column}: {float(got[token, column]):.6g} against "
        f"{float(expected[token, column]):.6g}, difference over budget {float(used.max()):.3g}",
        budget_used=float(used.max()),
    )


def _permuted(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    order = torch.arange(case.num_tokens, device=out.device).flip(0).roll(1)
    moved = _placed(
        case,
        hidden_states=case.hidden_states[order],
        topk_weights=case.topk_weights[order],
        topk_ids=case.topk_ids[order],
    )
    return _agree(PERMUTED, run(moved)[order.argsort()], out, budget, exact=numerics.permutation_invariant)


def _relabelled(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    num_experts = case.num_experts
    new_id = torch.arange(num_experts, device=out.device).flip(0)
    ids = torch.where(case.topk_ids < 0, case.topk_ids.long(), new_id[case.topk_ids.long().clamp(min=0)])
    if case.expert_map is None:
        renamed = _placed(case, topk_ids=ids.int(), w13=case.w13.flip(0), w2=case.w2.flip(0))
    else:
        renamed = _placed(case, topk_ids=ids.int(), expert_map=case.expert_map.flip(0))
    return _agree(RELABELLED, run(renamed), out, budget)


def _split(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    at = case.num_tokens // 2
    parts = [
        run(
            _placed(
                case,
                hidden_states=case.hidden_states[rows],
                topk_weights=case.topk_weights[rows],
                topk_ids=case.topk_ids[rows],
            )
        )
        for rows in (slice(0, at), slice(at, None))
        if case.topk_ids[rows].numel()
    ]
    return _agree(SPLIT, torch.cat(parts), out, budget)


def _linear(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    doubled = run(_placed(case, topk_weights=2 * case.topk_weights))
    return _agree(LINEAR, doubled, 2 * out.double(), budget, times=2.0)


def _dense(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    # The dense mixture, written without any routing: every token through every expert, as one product each.
    x = case.hidden_states.double()
    dense = torch.zeros_like(x)
    half = case.w2.shape[2]
    for expert in range(case.w13.shape[0]):
        gate, up = (x @ case.w13[expert].double().T).split(half, dim=1)
        weight = (case.topk_weights.double() * (case.topk_ids == expert)).sum(dim=1, keepdim=True)
        dense += weight * ((gate * gate.sigmoid() * up) @ case.w2[expert].double().T)
    return _agree(DENSE, out, dense, budget)


def _removable(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    ids = case.topk_ids.clone()
    ids[:, 0] = -1
    return _agree(REMOVABLE, run(_placed(case, topk_ids=ids)), out, budget)


def _duplicate(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    def with_copy(t: Tensor) -> Tensor:
        return torch.cat([t, t[:1]])

    longer = run(
        _placed(
            case,
            hidden_states=with_copy(case.hidden_states),
            topk_weights=with_copy(case.topk_weights),
            topk_ids=with_copy(case.topk_ids),
        )
    )
    first = Budget(*(getattr(budget, name)[:1] for name in Budget.__dataclass_fields__))
    return _agree(DUPLICATE, longer[-1:], longer[:1], first, exact=numerics.permutation_invariant)


def _shards(case: ExpertsCase, out: Tensor, trace: Trace, budget: Budget, numerics: Numerics, run: Run) -> Verdict:
    num_experts = case.num_experts
    total = torch.zeros_like(out, dtype=torch.float64)
    for rank in range(2):
        owned = torch.arange(num_experts, device=out.device)[rank::2]
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32, device=out.device)
        expert_map[owned] = torch.arange(len(owned), dtype=torch.int32, device=out.device)
        total += run(_placed(case, w13=case.w13[owned], w2=case.w2[owned], expert_map=expert_map)).double()
    # Each shard's last rounding is of a partial sum, which may exceed the whole.
    partial = (trace.output_weights[..., None] * trace.expert_output).abs().sum(dim=1)
    roundoff = torch.finfo(out.dtype).eps / 2
    wider = replace(budget, sigma=(budget.sigma**2 + 2 * (roundoff * partial) ** 2).sqrt(), last=1.5 * budget.last)
    return _agree(SHARDS, total, out, wider)


LAWS = (
    Law(PERMUTED, _permuted),
    Law(RELABELLED, _relabelled),
    Law(SPLIT, _split, runs=3),
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
        adapt=lambda spec: replace(spec, weights="one_zero", weight_on_input=False),
    ),
    Law(DUPLICATE, _duplicate),
    Law(
        SHARDS,
        _shards,
        applies=lambda spec: spec.M > 0 and spec.E > 1,
        adapt=lambda spec: replace(spec, expert_map="none"),
        runs=3,
    ),
)
