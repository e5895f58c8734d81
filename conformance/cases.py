"""From a spec to tensors: the operands of one case, in hostile memory, the same bits wherever the spec is replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference.batched import routed_call
from .arena import Arena, poison
from .spec import SCALINGS, TILE, AlignSpec, BatchedSpec, ExpertsSpec, RoutingSpec
from .values import integers, on_grid

# Poisoned elements behind each row of a padded operand; a multiple of 16, so that rows stay aligned as real ones are.
ROW_PADDING = 32
# The exponent of activations, 1 where not said otherwise.
MAGNITUDE = {"large": 3, "tiny": -6}


@dataclass(frozen=True)
class RoutingCase:
    """The operands of one routing call.

    Attributes:
        router_logits: `[M, E]`.
        top_k: experts a token.
        renormalize: whether the weights are divided by their sum.
        scoring_func: "softmax", "sigmoid" or "sqrtsoftplus".
        num_expert_group: number of groups, or None.
        topk_group: groups kept, or None.
        group_ranking: "max" or "top2_sum"; None without groups.
        e_score_correction_bias: `[E]` float32 or bfloat16, or None.
        routed_scaling_factor: of the weights, applied once.
        num_tokens_non_padded: `[1]` int32, the real tokens, which come first; or None. What follows is poison.
        custom_routing_function: what decides instead; called as `f(hidden_states=None, gating_output=router_logits,
            topk=top_k, renormalize=renormalize)`.
        custom_answer: its weights `[M, top_k]` float32 and ids `[M, top_k]` int32.
    """

    router_logits: Tensor
    top_k: int
    renormalize: bool
    arena: Arena
    scoring_func: str = "softmax"
    num_expert_group: int | None = None
    topk_group: int | None = None
    group_ranking: str | None = None
    e_score_correction_bias: Tensor | None = None
    routed_scaling_factor: float = 1.0
    num_tokens_non_padded: Tensor | None = None
    custom_routing_function: Callable[..., tuple[Tensor, Tensor]] | None = None
    custom_answer: tuple[Tensor, Tensor] | None = None

    def method(self) -> dict[str, Any]:
        """What a routing function needs beside logits and top_k, under the engines' names."""
        return {
            "scoring_func": self.scoring_func,
            "renormalize": self.renormalize,
            "num_expert_group": self.num_expert_group,
            "topk_group": self.topk_group,
            "group_ranking": self.group_ranking,
            "e_score_correction_bias": self.e_score_correction_bias,
            "routed_scaling_factor": self.routed_scaling_factor,
            "num_tokens_non_padded": self.num_tokens_non_padded,
            "custom_routing_function": self.custom_routing_function,
        }

    @property
    def num_real_tokens(self) -> int:
        """Tokens that are no padding."""
        return self.router_logits.shape[0] if self.num_tokens_non_padded is None else int(self.num_tokens_non_padded)


@dataclass(frozen=True)
class AlignCase:
    """The operands of one alignment.

    Attributes:
        topk_ids: `[M, top_k]` int32, global ids, -1 = no expert.
        block_size: rows of a block.
        num_experts: E, global.
        num_local_experts: experts held here; E without a map.
        expert_map: `[E]` int32 or None.
    """

    topk_ids: Tensor
    block_size: int
    num_experts: int
    num_local_experts: int
    expert_map: Tensor | None
    arena: Arena


@dataclass(frozen=True)
class ExpertsCase:
    """The operands of one call of the routed experts.

    Attributes:
        hidden_states: `[M, H]`.
        w13: `[E_local, 2I, H]`, gate rows first.
        w2: `[E_local, H, I]`.
        topk_weights: `[M, top_k]` float32.
        topk_ids: `[M, top_k]` int32, global ids, -1 = no expert.
        num_experts: E, global.
        expert_map: `[E]` int32, global to local id, -1 = on another rank; or None.
        apply_router_weight_on_input: the routing weight multiplies the experts' input.
        activation: between the two GEMMs.
    """

    hidden_states: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    num_experts: int
    expert_map: Tensor | None
    apply_router_weight_on_input: bool
    arena: Arena
    activation: str = "silu"

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        """Experts chosen for each token."""
        return self.topk_ids.shape[1]


@dataclass(frozen=True)
class BatchedCase:
    """The operands of one call of the experts in the batched activation format.

    Attributes:
        hidden_states: `[E_local, max_tokens, H]`, poison behind each expert's count.
        w13: `[E_local, 2I, H]`, gate rows first.
        w2: `[E_local, H, I]`.
        expert_num_tokens: `[E_local]` int32.
        out: `[E_local, max_tokens, H]` to write into, poison throughout.
        activation: between the two GEMMs.
    """

    hidden_states: Tensor
    w13: Tensor
    w2: Tensor
    expert_num_tokens: Tensor
    out: Tensor
    arena: Arena
    activation: str = "silu"

    @property
    def is_token(self) -> Tensor:
        """`[E_local, max_tokens]`, whether a row is one of its expert's tokens."""
        rows = torch.arange(self.hidden_states.shape[1], device=self.hidden_states.device)
        return rows[None, :] < self.expert_num_tokens[:, None]

    def routed(self) -> ExpertsCase:
        """The routed call that says the same: one expert a token, and weights of 1."""
        hidden_states, weights, ids, _ = routed_call(self.hidden_states, self.expert_num_tokens)
        num_experts = self.w13.shape[0]
        return ExpertsCase(
            hidden_states, self.w13, self.w2, weights, ids, num_experts, None, False, self.arena, self.activation
        )


def _ranks(seed: int, tensor: str, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """A hashed permutation of the last axis, `shape` int64."""
    return integers(seed, tensor, shape, 0, 1 << 40, device).argsort(dim=-1)


def routed_ids(spec: AlignSpec | ExpertsSpec, device: torch.device | str) -> Tensor:
    """`topk_ids [M, top_k]` int32 for a spec's routing."""
    m, e, k = spec.M, spec.E, spec.top_k
    ids = _ranks(spec.seed, "topk_ids", (m, e), device)[:, :k]
    if spec.routing == "one_expert":
        ids = ids[:1].expand(m, k)
    elif spec.routing == "empty_expert":
        # Expert 0's tokens go to an expert that is not yet in their row, where there is one.
        others = 1 + _ranks(spec.seed, "others", (m, max(e - 1, 1)), device)
        ids = others[:, :k] if e > k else ids
    elif spec.routing in ("tile_minus_1", "tile", "tile_plus_1"):
        tile = spec.block_size if isinstance(spec, AlignSpec) else TILE
        count = tile + {"tile_minus_1": -1, "tile": 0, "tile_plus_1": 1}[spec.routing]
        others = 1 + _ranks(spec.seed, "others", (m, max(e - 1, 1)), device)
        if e > k:
            ids = others[:, :k].clone()
            ids[:count, 0] = 0
    elif spec.routing == "skewed" and m:
        heavy = torch.arange(m, device=device) % 2 == 0
        has_zero = (ids == 0).any(dim=1)
        first = torch.where(heavy & ~has_zero, 0, ids[:, 0])
        ids = torch.cat([first[:, None], ids[:, 1:]], dim=1)
    elif spec.routing == "repeated":
        ids = integers(spec.seed, "repeated", (m, k), 0, e, device)
    elif spec.routing == "some_invalid":
        ids = ids.masked_fill(integers(spec.seed, "invalid", (m, k), 0, 3, device) == 0, -1)
    elif spec.routing == "all_invalid":
        ids = torch.full_like(ids, -1)
    return ids.to(torch.int32).contiguous()


def local_experts(spec: AlignSpec | ExpertsSpec, device: torch.device | str) -> tuple[Tensor | None, int]:
    """`expert_map [E]` int32 (or None) and the number of experts held here."""
    e = spec.E
    if spec.expert_map == "none":
        return None, e
    order = torch.arange(e, device=device)
    if spec.expert_map == "linear":
        owned = order[e // 2 :]
    elif spec.expert_map == "round_robin":
        owned = order[spec.seed % 2 :: 2] if e > 1 else order
    elif spec.expert_map == "arbitrary":
        owned = _ranks(spec.seed, "owned", (e,), device)[: max(1, e // 3)]
    elif spec.expert_map == "owns_all":
        owned = _ranks(spec.seed, "owned", (e,), device)
    else:
        owned = order[:0]
    expert_map = torch.full((e,), -1, dtype=torch.int32, device=device)
    expert_map[owned] = torch.arange(len(owned), dtype=torch.int32, device=device)
    # A rank that owns nothing still holds one expert's weights, which nothing is routed to.
    return expert_map, max(len(owned), 1)


def _weights(spec: ExpertsSpec, device: torch.device | str) -> Tensor:
    shape = (spec.M, spec.top_k)
    raw = on_grid(spec.seed, "topk_weights", shape, torch.float32, device).abs() + 2.0**-6
    if spec.weights == "spread":
        return raw * on_grid(spec.seed, "spread", shape, torch.float32, device, spread=8).abs()
    weights = raw / raw.sum(dim=-1, keepdim=True)
    if spec.weights == "scaled":
        weights = weights * 2.5
    if spec.weights == "one_zero" and spec.top_k:
        weights = torch.cat([torch.zeros_like(weights[:, :1]), weights[:, 1:]], dim=1)
    return weights


def _operand_values(spec: ExpertsSpec | BatchedSpec, device: torch.device | str) -> Callable[..., Tensor]:
    """What makes the values of a named operand of a spec, from its name, shape and `exponent`."""
    dtype = getattr(torch, spec.dtype)
    spread = 6 if spec.values == "spread" else 0

    def values(name: str, *shape: int, exponent: int) -> Tensor:
        return on_grid(spec.seed, name, shape, dtype, device, exponent=exponent, spread=spread)

    return values


def _expert_weights(
    spec: ExpertsSpec | BatchedSpec, num_local: int, values: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """`w13 [E_local, 2I, H]` and `w2 [E_local, H, I]`, scaled by 1/sqrt(fan-in), as in trained models."""
    fan_h, fan_i = round(math.log2(max(spec.H, 1)) / 2), round(math.log2(max(spec.I, 1)) / 2)
    up = 4 if spec.values == "asymmetric" else 0
    gate_up = [
        values("gate", num_local, spec.I, spec.H, exponent=1 - fan_h),
        values("up", num_local, spec.I, spec.H, exponent=1 - fan_h + up),
    ]
    return torch.cat(gate_up, dim=1), values("w2", num_local, spec.H, spec.I, exponent=1 - fan_i)


def build_experts(spec: ExpertsSpec, device: torch.device | str = "cpu") -> ExpertsCase:
    """The operands of an experts spec."""
    expert_map, num_local = local_experts(spec, device)
    values = _operand_values(spec, device)
    w13, w2 = _expert_weights(spec, num_local, values)
    arena = Arena()
    padding = ROW_PADDING if spec.padded_rows else 0
    return ExpertsCase(
        hidden_states=arena.place(
            "hidden_states",
            values("hidden_states", spec.M, spec.H, exponent=MAGNITUDE.get(spec.values, 1)),
            row_padding=padding,
        ),
        w13=arena.place("w13", w13, row_padding=padding),
        w2=arena.place("w2", w2, row_padding=padding),
        topk_weights=arena.place("topk_weights", _weights(spec, device)),
        topk_ids=arena.place("topk_ids", routed_ids(spec, device)),
        num_experts=spec.E,
        expert_map=None if expert_map is None else arena.place("expert_map", expert_map),
        apply_router_weight_on_input=spec.weight_on_input,
        arena=arena,
    )


def _counts(spec: BatchedSpec, device: torch.device | str) -> Tensor:
    """`expert_num_tokens [E_local]` int32; a tile has no more rows than its slab."""
    counts = integers(spec.seed, "counts", (spec.E,), 0, spec.max_tokens + 1, device)
    if spec.counts in ("zero", "full", "one_expert"):
        counts = torch.full_like(counts, spec.max_tokens if spec.counts == "full" else 0)
    if spec.counts == "one_expert":
        counts[-1] = spec.max_tokens
    if spec.counts.startswith("tile"):
        count = TILE + {"tile_minus_1": -1, "tile": 0, "tile_plus_1": 1}[spec.counts]
        counts[0] = min(count, spec.max_tokens)
    return counts.to(torch.int32)


def build_batched(spec: BatchedSpec, device: torch.device | str = "cpu") -> BatchedCase:
    """The operands of a batched spec."""
    values = _operand_values(spec, device)
    w13, w2 = _expert_weights(spec, spec.E, values)
    shape = (spec.E, spec.max_tokens, spec.H)
    hidden_states = values("hidden_states", *shape, exponent=MAGNITUDE.get(spec.values, 1))
    counts = _counts(spec, device)
    behind = torch.arange(spec.max_tokens, device=device)[None, :] >= counts[:, None]
    unknown = poison(hidden_states.dtype)
    arena = Arena()
    padding = ROW_PADDING if spec.padded_rows else 0
    return BatchedCase(
        hidden_states=arena.place(
            "hidden_states", hidden_states.masked_fill(behind[..., None], unknown), row_padding=padding
        ),
        w13=arena.place("w13", w13, row_padding=padding),
        w2=arena.place("w2", w2, row_padding=padding),
        expert_num_tokens=arena.place("expert_num_tokens", counts),
        out=arena.place("out", torch.full_like(hidden_states, unknown), row_padding=padding, fixed=False),
        arena=arena,
    )


def build_align(spec: AlignSpec, device: torch.device | str = "cpu") -> AlignCase:
    """The operands of an alignment spec."""
    arena = Arena()
    expert_map, num_local = local_experts(spec, device)
    return AlignCase(
        topk_ids=arena.place("topk_ids", routed_ids(spec, device)),
        block_size=spec.block_size,
        num_experts=spec.E,
        num_local_experts=num_local,
        expert_map=None if expert_map is None else arena.place("expert_map", expert_map),
        arena=arena,
    )


def _logits(spec: RoutingSpec, device: torch.device | str) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    shape = (spec.M, spec.E)
    exponent = 7 if spec.logits == "wide" else 2
    logits = on_grid(spec.seed, "logits", shape, dtype, device, exponent=exponent)
    if spec.logits == "ties":
        logits = (integers(spec.seed, "ties", shape, 0, 3, device) * 0.5).to(dtype)
    elif spec.logits == "equal":
        logits = torch.full_like(logits, 0.25)
    elif spec.logits == "negative":
        logits = logits - 32
    elif spec.logits == "saturating":
        logits = logits + 24
    elif spec.logits == "equal_groups":
        count, _ = spec.group_counts()
        logits = logits[:, : spec.E // count].repeat(1, count)
    elif spec.logits == "tie_at_k" and spec.top_k < spec.E:
        order = logits.argsort(dim=-1, descending=True)
        kth, following = order[:, spec.top_k - 1 : spec.top_k], order[:, spec.top_k : spec.top_k + 1]
        logits = logits.scatter(1, following, logits.gather(1, kth))
    elif spec.logits in ("nan_rows", "infinite_rows"):
        where = integers(spec.seed, "where", shape, 0, 4, device)
        whole = integers(spec.seed, "whole", (spec.M, 1), 0, 4, device) == 0
        if spec.logits == "nan_rows":
            logits = logits.masked_fill((where == 0) | whole, float("nan"))
        else:
            # Rows with some -inf, rows with some +inf among them, rows of nothing but -inf.
            logits = logits.masked_fill((where == 0) | whole, -torch.inf)
            plus = integers(spec.seed, "plus", (spec.M, 1), 0, 2, device) == 0
            logits = logits.masked_fill((where == 1) & plus & ~whole, torch.inf)
    return logits


def _correction_bias(spec: RoutingSpec, device: torch.device | str) -> Tensor | None:
    """`e_score_correction_bias [E]`; a power of two that is not much larger is added to each value exactly."""
    shape = (spec.E,)
    unit = on_grid(spec.seed, "bias", shape, torch.float32, device, exponent=-1)
    if spec.correction_bias == "none":
        return None
    if spec.correction_bias == "bfloat16":
        return on_grid(spec.seed, "bias", shape, torch.bfloat16, device, exponent=-1)
    values = {
        "equal": torch.full(shape, 0.75, device=device),
        "unit": unit,
        "reverses": _ranks(spec.seed, "reverses", shape, device) * 16.0,
        "ties": integers(spec.seed, "bias_ties", shape, 0, 2, device) * 0.5,
        "negative": unit - 8,
    }
    return values[spec.correction_bias].float()


def _custom_routing(spec: RoutingSpec, logits: Tensor, arena: Arena) -> dict[str, Any]:
    """A function whose answer is made of hashes: an implementation that does not ask it cannot guess it."""
    device = logits.device
    weights = on_grid(spec.seed, "custom", (spec.M, spec.top_k), torch.float32, device).abs() + 0.25
    ids = _ranks(spec.seed, "custom_ids", (spec.M, spec.E), device)[:, : spec.top_k].to(torch.int32)
    answer = arena.place("custom_weights", weights), arena.place("custom_ids", ids)

    def function(
        hidden_states: Tensor | None, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        del hidden_states
        same_logits = torch.equal(gating_output.double().nan_to_num(), logits.double().nan_to_num())
        # An answer to another question is none of this case's.
        is_ours = same_logits and (topk, renormalize) == (spec.top_k, spec.renormalize)
        return answer if is_ours else (answer[0] * 0, answer[1] * 0)

    return {"custom_routing_function": function, "custom_answer": answer}


def build_routing(spec: RoutingSpec, device: torch.device | str = "cpu") -> RoutingCase:
    """The operands of a routing spec.

    Raises:
        ValueError: groups that E, the ranking or the scoring do not go with, or more choices than they allow.
    """
    if spec.top_k > spec.most_choices():
        raise ValueError(f"spec: expected top_k of at most {spec.most_choices()} with these groups, got {spec!r}")
    arena = Arena()
    padding = ROW_PADDING if spec.padded_rows else 0
    logits = _logits(spec, device)
    real = {"none": spec.M, "no_token": spec.M, "some": spec.M - spec.M // 3, "all_tokens": 0}[spec.padding]
    logits[real:] = float("nan")
    logits = arena.place("router_logits", logits, row_padding=padding)
    bias = _correction_bias(spec, device)
    count, kept = spec.group_counts()
    grouped = spec.groups != "none"
    is_custom = spec.scoring == "custom"
    return RoutingCase(
        router_logits=logits,
        top_k=spec.top_k,
        renormalize=spec.renormalize,
        arena=arena,
        scoring_func="softmax" if is_custom else spec.scoring,
        num_expert_group=count if grouped else None,
        topk_group=kept if grouped else None,
        group_ranking=spec.group_ranking if grouped else None,
        e_score_correction_bias=None if bias is None else arena.place("e_score_correction_bias", bias),
        routed_scaling_factor=SCALINGS[spec.scaling],
        num_tokens_non_padded=None
        if spec.padding == "none"
        else arena.place("num_tokens_non_padded", torch.tensor([real], dtype=torch.int32, device=device)),
        **(_custom_routing(spec, logits, arena) if is_custom else {}),
    )
