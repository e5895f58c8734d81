"""ROUTE: routings that say the same in other words. The answer to one is a legal answer to the other, with its weights.

A near tie may turn out differently in either, so that ids cannot be compared; legal answers can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..arena import Arena
from ..cases import RoutingCase
from ..judge import Property, Verdict, declare, first_violated
from ..spec import SCALINGS, RoutingSpec
from ..subject import Capabilities
from .route import allowed_weight_error, judge_choice, judge_weights, truth_of

SHIFTED = declare(
    "ROUTE-12",
    "a constant added to every bias changes neither the experts nor their weights, within budget",
    "route",
    is_value=True,
    needs=lambda can: set(can.correction_biases) != {"none"},
)
UNGROUPED = declare(
    "ROUTE-13",
    "groups that are all kept are as good as none",
    "route",
    is_value=True,
    needs=lambda can: {"one_group", "all_kept"} <= set(can.groups),
)
SCALED = declare(
    "ROUTE-14",
    "another scaling factor chooses the same experts, and multiplies their weights once, renormalised or not",
    "route",
    is_value=True,
    needs=lambda can: set(can.scalings) != {"one"},
)
ONLY_RANKS = declare(
    "ROUTE-15",
    "a bias never weighs: where every expert is chosen it changes no weight",
    "route",
    is_value=True,
    needs=lambda can: set(can.correction_biases) != {"none"},
)

# Added to a bias whose values lie on a grid of 2**-21, or are integers, so that it rounds nothing.
SHIFT = 2.0
# Experts that are all chosen by ROUTE-15: one block of choices.
FEW_EXPERTS = 8


@dataclass(frozen=True)
class RoutingLaw:
    """One law.

    Attributes:
        property: whose verdict it gives.
        adapt: the spec that can state it, from what was drawn and what the subject declares.
        applies: whether an adapted spec states it.
        other: the same routing in other words.
        order: whether the experts' order is judged too, and not their weights alone.
        scale: what the other's weights are multiplied with.
    """

    property: Property
    adapt: Callable[[RoutingSpec, Capabilities], RoutingSpec]
    applies: Callable[[RoutingSpec], bool]
    other: Callable[[RoutingCase, RoutingSpec, Capabilities], RoutingCase]
    order: bool = True
    scale: float = 1.0

    def judge(
        self,
        case: RoutingCase,
        spec: RoutingSpec,
        can: Capabilities,
        run: Callable[[RoutingCase], tuple[Tensor, Tensor]],
    ) -> Verdict:
        """Whether the answer to either routing is a legal answer to the other, with the other's weights."""
        other = self.other(case, spec, can)
        one, two = _answer(case, run), _answer(other, run)
        for _, ids in (one, two):
            if not _is_a_choice(ids, case.router_logits.shape[1]):
                return self.property.verdict(False, f"ids are no answer to any routing: {ids.tolist()}")
        # By scores both, since a method may compare by logits and the same in other words by scores.
        here, there = truth_of(case, by_scores=True), truth_of(other, by_scores=True)
        verdicts = judge_weights(case, here, two[0] * self.scale, two[1])
        verdicts += judge_weights(other, there, one[0] / self.scale, one[1])
        if self.order:
            verdicts += judge_choice(here.widened(there), two[1])
            verdicts += judge_choice(there.widened(here), one[1])
        violated = first_violated(verdicts)
        if violated is not None:
            return self.property.verdict(False, f"by {violated.property.id}: {violated.detail}")
        # Of tokens with the same experts the weights agree without the reference's word on them.
        dense_one, dense_two = (_dense(*answer, case.router_logits.shape[1]) for answer in (one, two))
        same = ((dense_one > 0) == (dense_two > 0)).all(dim=1)
        allowed = 2**0.5 * allowed_weight_error(case, here, one[1])
        error = (dense_one - dense_two * self.scale).abs().gather(1, one[1]) / allowed
        used = float(error[same].max()) if same.any() else 0.0
        return self.property.verdict(used <= 1, f"weights differ by {used:.3g} of the budget", budget_used=used)


def _answer(case: RoutingCase, run: Callable[[RoutingCase], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weights in float64 and ids in int64 of the real tokens."""
    weights, ids = run(case)
    return weights[: case.num_real_tokens].double(), ids[: case.num_real_tokens].long()


def _is_a_choice(ids: Tensor, num_experts: int) -> bool:
    in_order = ids.sort(dim=1).values
    distinct = in_order[:, 1:] > in_order[:, :-1]
    return bool((in_order >= 0).all() and (in_order < num_experts).all() and distinct.all())


def _dense(weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    return weights.new_zeros(len(ids), num_experts).scatter(1, ids, weights)


def _with_bias(spec: RoutingSpec, can: Capabilities) -> RoutingSpec:
    """A spec with a bias and a scoring that takes one."""
    biases = [name for name in can.correction_biases if name != "none"]
    scorings = [name for name in can.scorings if name != "custom"]
    few = min(spec.E, FEW_EXPERTS)  # where softmax was all, E is of another pool, and a kernel of its own on a GPU
    return replace(
        spec,
        E=few if spec.is_plain() else spec.E,
        top_k=min(spec.top_k, few) if spec.is_plain() else spec.top_k,
        scoring=spec.scoring if spec.scoring != "custom" else scorings[spec.seed % len(scorings)],
        correction_bias=spec.correction_bias if spec.correction_bias != "none" else biases[spec.seed % len(biases)],
    )


def _all_chosen(spec: RoutingSpec, can: Capabilities) -> RoutingSpec:
    few = min(spec.E, FEW_EXPERTS)
    return replace(_with_bias(spec, can), E=few, top_k=few, groups="none", group_ranking="max")


def _shifted(case: RoutingCase, spec: RoutingSpec, can: Capabilities) -> RoutingCase:
    bias = case.e_score_correction_bias
    if bias is None:
        raise ValueError(f"spec: expected a bias to shift, got {spec!r}")
    return replace(case, e_score_correction_bias=Arena().place("e_score_correction_bias", bias.float() + SHIFT))


def _grouped(case: RoutingCase, spec: RoutingSpec, can: Capabilities) -> RoutingCase:
    num_experts = case.router_logits.shape[1]
    counts = [n for n in (1, 2, 4, 8) if num_experts % n == 0 and num_experts // n >= 2]
    count = counts[spec.seed % len(counts)]
    ranking = can.group_rankings[spec.seed % len(can.group_rankings)]
    return replace(case, num_expert_group=count, topk_group=count, group_ranking=ranking)


def _has_answers(spec: RoutingSpec) -> bool:
    """Whether there is a token with a choice that is not the caller's own."""
    has_tokens = spec.M > 0 and spec.padding != "all_tokens"
    return has_tokens and spec.scoring != "custom" and spec.top_k <= spec.most_choices()


LAWS = (
    RoutingLaw(
        SHIFTED,
        adapt=_with_bias,
        applies=lambda spec: _has_answers(spec) and spec.correction_bias != "none",
        other=_shifted,
    ),
    RoutingLaw(
        UNGROUPED,
        adapt=lambda spec, can: replace(spec, groups="none", group_ranking="max"),
        applies=lambda spec: _has_answers(spec) and spec.groups == "none" and spec.E > 1,
        other=_grouped,
    ),
    RoutingLaw(
        SCALED,
        adapt=lambda spec, can: replace(spec, scaling="one"),
        applies=lambda spec: _has_answers(spec) and spec.scaling == "one",
        other=lambda case, spec, can: replace(case, routed_scaling_factor=SCALINGS["above_one"]),
        scale=1 / SCALINGS["above_one"],
    ),
    RoutingLaw(
        ONLY_RANKS,
        adapt=_all_chosen,
        applies=lambda spec: _has_answers(spec) and spec.top_k == spec.E and spec.correction_bias != "none",
        other=lambda case, spec, can: replace(case, e_score_correction_bias=None),
        order=False,
    ),
)
