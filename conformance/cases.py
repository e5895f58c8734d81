"""From a spec to tensors: the operands of one case, in hostile memory, the same bits wherever the spec is replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..reference.activations import SILU, Activation
from ..reference.batched import routed_call
from ..reference.quantization import LARGEST, ActivationQuantization, QuantizedWeight
from .arena import Arena, poison
from .operands import ExpertsOperands
from .spec import ACTIVATIONS, SCALINGS, TILE, AlignSpec, BatchedSpec, ExpertsSpec, QuantizeSpec, RoutingSpec
from .stored import DTYPES, StoredExperts, static_scale, stored_experts
from .values import integers, on_grid

# Poisoned elements behind each row of a padded operand; a multiple of 16, so that rows stay aligned as real ones are.
ROW_PADDING = 32
# The exponent of activations (`_magnitude`), 1 where not said otherwise.
MAGNITUDE = {"large": 3, "extreme": 6, "tiny": -6}


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
class QuantizeCase:
    """The operands of one quantisation of activations.

    Attributes:
        x: `[rows, K]`.
        how: the format, and what shares a scale.
        static_scale: `[1]` float32 where the scale is given, else None.
    """

    x: Tensor
    how: ActivationQuantization
    static_scale: Tensor | None
    arena: Arena


@dataclass(frozen=True)
class LayerCase:
    """The parameters of the experts held here, which both activation formats share.

    Attributes:
        w13: `[E_local, 2I, H]`, gate rows first, or as `activation` says; stored in few bits where `stored` is there.
        w2: `[E_local, H, I]`, likewise.
        arena: where all operands lie.
        activation: between the two GEMMs, by the reference's name and parameters.
        w13_bias: `[E_local, 2I]` of the activations' dtype or float32, or None.
        w2_bias: `[E_local, H]`, or None.
        stored: scales and zero points of quantised weights, and how activations are quantised; None without.
        prepared: what the subject made of the weights (see `Subject.prepare`); None before it did.
    """

    w13: Tensor
    w2: Tensor
    arena: Arena
    activation: Activation = SILU
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    stored: StoredExperts | None = None
    prepared: Any = None

    @property
    def num_local_experts(self) -> int:
        """E_local."""
        return self.w2.shape[0]

    @property
    def activation_scale(self) -> str:
        """What shares a scale of the activations; `none` where they are not quantised."""
        return (None if self.stored is None else self.stored.scheme.activation_scale) or "none"

    def tensors(self) -> dict[str, Tensor]:
        """Every operand that is a tensor, by name."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "prepared"}
        return own if self.stored is None else own | self.stored.tensors()

    def layer(self) -> dict[str, Any]:
        """The reference's arguments that say what the experts are."""
        w13: Tensor | QuantizedWeight = self.w13
        w2: Tensor | QuantizedWeight = self.w2
        if self.stored is not None:
            w13, w2 = self.stored.w13(self.w13, self.activation), self.stored.w2(self.w2)
        return {
            "w13": w13,
            "w2": w2,
            "w13_bias": self.w13_bias,
            "w2_bias": self.w2_bias,
            "activation": self.activation,
            "quantize_input": None if self.stored is None else self.stored.activations(self.stored.a13_scale),
            "quantize_hidden": None if self.stored is None else self.stored.activations(self.stored.a2_scale),
        }

    def layer_of_experts(self, which: Tensor) -> dict[str, Any]:
        """This case's fields with some of the experts alone, `which` an index into them."""

        def some(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[which]

        return {
            "w13": self.w13[which],
            "w2": self.w2[which],
            "w13_bias": some(self.w13_bias),
            "w2_bias": some(self.w2_bias),
            "stored": None if self.stored is None else self.stored.of_experts(which),
        }


@dataclass(frozen=True, kw_only=True)
class ExpertsCase(LayerCase):
    """The operands of one call of the routed experts.

    Attributes:
        hidden_states: `[M, H]`.
        topk_weights: `[M, top_k]` float32.
        topk_ids: `[M, top_k]` int32, global ids, -1 = no expert.
        num_experts: E, global.
        expert_map: `[E]` int32, global to local id, -1 = on another rank; or None.
        apply_router_weight_on_input: the routing weight multiplies the experts' input.
    """

    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    num_experts: int
    expert_map: Tensor | None = None
    apply_router_weight_on_input: bool = False

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        """Experts chosen for each token."""
        return self.topk_ids.shape[1]

    def operands(self) -> ExpertsOperands:
        """The reference's arguments."""
        return ExpertsOperands(
            hidden_states=self.hidden_states,
            topk_weights=self.topk_weights,
            topk_ids=self.topk_ids,
            expert_map=self.expert_map,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            **self.layer(),
        )


@dataclass(frozen=True, kw_only=True)
class BatchedCase(LayerCase):
    """The operands of one call of the experts in the batched activation format.

    Attributes:
        hidden_states: `[E_local, max_tokens, H]`, poison behind each expert's count.
        expert_num_tokens: `[E_local]` int32.
        out: `[E_local, max_tokens, H]` to write into, poison throughout.
    """

    hidden_states: Tensor
    expert_num_tokens: Tensor
    out: Tensor

    @property
    def is_token(self) -> Tensor:
        """`[E_local, max_tokens]`, whether a row is one of its expert's tokens."""
        rows = torch.arange(self.hidden_states.shape[1], device=self.hidden_states.device)
        return rows[None, :] < self.expert_num_tokens[:, None]

    def routed(self) -> ExpertsCase:
        """The routed call that says the same: one expert a token, and weights of 1."""
        hidden_states, weights, ids, _ = routed_call(self.hidden_states, self.expert_num_tokens)
        shared = {name: value for name, value in vars(self).items() if name in LayerCase.__dataclass_fields__}
        return ExpertsCase(
            hidden_states=hidden_states,
            topk_weights=weights,
            topk_ids=ids,
            num_experts=self.num_local_experts,
            **shared,
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
    if spec.weights == "signed":
        weights = weights * (1 - 2 * (torch.arange(spec.M * spec.top_k, device=device).view(shape) % 2))
    if spec.weights == "one_zero" and spec.top_k:
        weights = torch.cat([torch.zeros_like(weights[:, :1]), weights[:, 1:]], dim=1)
    return weights


def activation_of(spec: ExpertsSpec | BatchedSpec) -> Activation:
    """The reference's activation of a spec."""
    name, parameters = ACTIVATIONS[spec.activation]
    return Activation(name, **parameters)


def _magnitude(spec: ExpertsSpec | BatchedSpec) -> int:
    """The exponent of activations; extreme ones, or their products, would leave float16, which gets large ones."""
    values = "large" if spec.values == "extreme" and spec.dtype == "float16" else spec.values
    return MAGNITUDE.get(values, 1)


def _operand_values(spec: ExpertsSpec | BatchedSpec, device: torch.device | str) -> Callable[..., Tensor]:
    """What makes the values of a named operand of a spec, from its name, shape and `exponent`."""
    dtype = getattr(torch, spec.dtype)
    spread = 6 if spec.values == "spread" else 0

    def values(name: str, *shape: int, exponent: int) -> Tensor:
        return on_grid(spec.seed, name, shape, dtype, device, exponent=exponent, spread=spread)

    return values


def _hidden_states(spec: ExpertsSpec | BatchedSpec, values: Callable[..., Tensor], *rows: int) -> Tensor:
    """`[…, H]` activations; some of them zero where the spec says so."""
    x = values("hidden_states", *rows, spec.H, exponent=_magnitude(spec))
    if spec.values != "zero_rows":
        return x
    kind = integers(spec.seed, "zero_rows", (*rows, 1), 0, 4, x.device)
    first = torch.arange(spec.H, device=x.device) < (spec.block_k or ROW_PADDING)
    return x.masked_fill((kind == 0) | ((kind > 1) & first), 0)


def _layer(
    spec: ExpertsSpec | BatchedSpec, num_local: int, values: Callable[..., Tensor], arena: Arena
) -> dict[str, Any]:
    """The fields of `LayerCase`, weights of about 1/sqrt(fan-in), as in trained models, all in hostile memory."""
    activation = activation_of(spec)
    device = values("device", 1, exponent=0).device
    size_13, size_2 = (1 - round(math.log2(max(fan_in, 1)) / 2) for fan_in in (spec.H, spec.I))
    rows = (2 if activation.is_gated else 1) * spec.I
    stored = None
    if spec.scheme == "none":
        up = 4 if spec.values == "asymmetric" else 0
        gate_up = [
            values("gate", num_local, spec.I, spec.H, exponent=size_13),
            values("up", num_local, spec.I, spec.H, exponent=size_13 + up),
        ]
        if activation.interleaved:
            w13 = torch.stack(gate_up, dim=2).flatten(1, 2)
        else:
            w13 = torch.cat(gate_up if activation.is_gated else gate_up[:1], dim=1)
        w2 = values("w2", num_local, spec.H, spec.I, exponent=size_2)
    else:
        magnitude = 2.0 ** _magnitude(spec)
        nominal = (magnitude, magnitude**2 * (16 if spec.values == "asymmetric" else 1))
        w13, w2, stored = stored_experts(spec, num_local, activation, (size_13, size_2), nominal, device)
    # Biases are of the size of what they are added to.
    size = min(MAGNITUDE.get(spec.values, 1), 1) - 1
    dtype = torch.float32 if spec.bias == "both_float32" else getattr(torch, spec.dtype)
    named = {"w13_bias": ("w13", rows), "w2_bias": ("w2", spec.H)}
    # A wider bias lies a little beyond the activations' grid, all of it on one side: rounding it to their dtype would
    # take as much from every value, which shows where noise would not.
    storage = getattr(torch, spec.dtype)
    beyond = 1.0 if dtype == storage else 1 + 0.95 * torch.finfo(storage).eps / 4
    biases = {
        name: on_grid(spec.seed, name, (num_local, width), storage, device, exponent=size).to(dtype) * beyond
        for name, (which, width) in named.items()
        if spec.bias.startswith("both") or spec.bias == which
    }
    padding = ROW_PADDING if spec.padded_rows else 0
    if stored is not None:
        stored = replace(stored, **{name: arena.place(name, t) for name, t in stored.tensors().items()})
    return {
        "w13": arena.place("w13", w13, row_padding=padding),
        "w2": arena.place("w2", w2, row_padding=padding),
        "arena": arena,
        "activation": activation,
        "stored": stored,
        **{name: arena.place(name, bias, row_padding=padding) for name, bias in biases.items()},
    }


def build_experts(spec: ExpertsSpec, device: torch.device | str = "cpu") -> ExpertsCase:
    """The operands of an experts spec."""
    expert_map, num_local = local_experts(spec, device)
    values = _operand_values(spec, device)
    arena = Arena()
    padding = ROW_PADDING if spec.padded_rows else 0
    return ExpertsCase(
        hidden_states=arena.place("hidden_states", _hidden_states(spec, values, spec.M), row_padding=padding),
        topk_weights=arena.place("topk_weights", _weights(spec, device), row_padding=padding),
        topk_ids=arena.place("topk_ids", routed_ids(spec, device), row_padding=padding),
        num_experts=spec.E,
        expert_map=None if expert_map is None else arena.place("expert_map", expert_map),
        apply_router_weight_on_input=spec.weight_on_input,
        **_layer(spec, num_local, values, arena),
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
    hidden_states = _hidden_states(spec, values, spec.E, spec.max_tokens)
    counts = _counts(spec, device)
    behind = torch.arange(spec.max_tokens, device=device)[None, :] >= counts[:, None]
    unknown = poison(hidden_states.dtype)
    arena = Arena()
    padding = ROW_PADDING if spec.padded_rows else 0
    return BatchedCase(
        hidden_states=arena.place(
            "hidden_states", hidden_states.masked_fill(behind[..., None], unknown), row_padding=padding
        ),
        expert_num_tokens=arena.place("expert_num_tokens", counts),
        out=arena.place("out", torch.full_like(hidden_states, unknown), row_padding=padding, fixed=False),
        **_layer(spec, spec.E, values, arena),
    )


def build_quantize(spec: QuantizeSpec, device: torch.device | str = "cpu") -> QuantizeCase:
    """The operands of a quantisation."""
    dtype, shape = getattr(torch, spec.dtype), (spec.rows, spec.columns)
    kind, scale = spec.quantizer.split("_")
    width = {"group": spec.group}.get(scale, max(1, spec.columns))
    static = static_scale(spec.seed, "static", 2.0, device) if scale == "static" else None
    spread = 18 if spec.values == "spread" else 0
    x = on_grid(spec.seed, "x", shape, dtype, device, exponent=1, spread=spread)
    column = torch.arange(spec.columns, device=device)
    if spec.values == "zero_rows":
        which = integers(spec.seed, "zero", (spec.rows, -(-spec.columns // width)), 0, 3, device)
        x = x.masked_fill(which.repeat_interleave(width, dim=1)[:, : spec.columns] == 0, 0)
        x = x.masked_fill(integers(spec.seed, "zero_row", (spec.rows, 1), 0, 4, device) == 0, 0)
    elif spec.values == "ties":
        # The largest number leads what shares a scale, or ends it in every second row: the scale is 2**-6, and what is
        # not the largest lies between two numbers.
        largest = LARGEST[DTYPES[kind]]
        step = integers(spec.seed, "step", shape, 8, 15, device) + 0.5
        power = torch.tensor([2.0**e for e in range(-3, 5)], device=device)
        between = step * power[integers(spec.seed, "power", shape, 0, 8, device)]
        between = between if kind == "fp8" else integers(spec.seed, "step", shape, 0, 127, device) + 0.5
        sign = 1 - 2 * integers(spec.seed, "sign", shape, 0, 2, device)
        is_last = (column % width == width - 1) | (column == spec.columns - 1)
        ends = (torch.arange(spec.rows, device=device) % 2 == 1)[:, None]
        x = torch.where(torch.where(ends, is_last, column % width == 0), largest, between * sign)
        x = (x * 2.0**-6).to(dtype)
        static = None if static is None else torch.tensor([2.0**-6], device=device)
    arena = Arena()
    how = ActivationQuantization(
        DTYPES[kind],
        "tensor" if scale == "static" else scale,
        group=spec.group,
        static_scale=None if static is None else float(static),
    )
    return QuantizeCase(
        x=arena.place("x", x, row_padding=ROW_PADDING if spec.padded_rows else 0),
        how=how,
        static_scale=None if static is None else arena.place("static_scale", static),
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
