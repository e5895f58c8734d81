"""Cases of a layer with LoRA adapters: a spec, its operands, and how both are drawn.

Adapters are about as large as the layer's own weights, so that what is wrong with one is wrong by many roundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..reference import lora as reference
from .arena import Arena
from .cases import BatchedCase, ExpertsCase, build_batched, build_experts
from .operands import ExpertsOperands
from .spec import SCHEMES, BatchedSpec, ExpertsSpec, Spec
from .strategies import MEAN_ROWS, POOLS, SEEDS, compiled_dtypes, may_go_together
from .subject import Capabilities
from .values import integers, on_grid
from .words import reference_adapter

RANKS = {
    "one": (8,),
    "mixed": (8, 3, 16, 1),
    "wide": (40, 8),  # more than one block of a rank
    "many": (8,) * 6,
    "crowd": (2,) * 18,  # more than kernels look at in one step, and a block of rows with more than a few
    "large": (150, 4),  # several blocks of one adapter's rank
}
# Of those, the ones that are pinned alone: so many matrices take long to make.
PINNED_RANKS = ("crowd", "large")
ADAPTED = (
    "everything",
    "shared_a",  # gate and up share one A
    "some_experts",  # each adapter leaves out a third of the experts
    "first_only",
    "down_only",
    "gate_only",
    "up_only",
    "zero_b",  # as adapters are before they are trained
    "nothing",
)
TOKENS = (
    "mixed",  # of every adapter, and a third without one
    "none",  # every id is -1
    "all",  # none is
    "last",  # one adapter for all tokens: the last
)


@dataclass(frozen=True)
class LoraSpec(Spec):
    """One call of a layer with adapters.

    Attributes:
        M: tokens, or rows of a slab.
        ranks: of the adapters, by a name of `RANKS`.
        adapted: what they adapt, of `ADAPTED`.
        tokens: which tokens have one, of `TOKENS`.
        is_batched: the batched activation format, in which routing and expert map say nothing.
        multiple: of which every adapter's rank is one, rounded up.
    """

    facet: ClassVar[str] = "lora"
    is_covered: ClassVar[bool] = False

    M: int
    H: int
    I: int
    E: int
    top_k: int
    ranks: str = "mixed"
    adapted: str = "everything"
    tokens: str = "mixed"
    is_batched: bool = False
    dtype: str = "bfloat16"
    routing: str = "uniform"
    expert_map: str = "none"
    scheme: str = "none"
    block_n: int = 0
    block_k: int = 0
    activation: str = "silu"
    bias: str = "none"
    values: str = "unit"
    weight_on_input: bool = False
    padded_rows: bool = False
    multiple: int = 1
    seed: int = 0

    def layer(self) -> ExpertsSpec | BatchedSpec:
        """The same layer without adapters."""
        cls = BatchedSpec if self.is_batched else ExpertsSpec
        known = {f.name for f in fields(cls)} & {f.name for f in fields(self)}
        given = {name: getattr(self, name) for name in known}
        return BatchedSpec(max_tokens=self.M, counts="uneven", **given) if self.is_batched else ExpertsSpec(**given)


@dataclass(frozen=True, eq=False)
class LoraMatrix:
    """`scale * b @ a`: `a [r, K]`, `b [N, r]` in the activations' dtype."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """One adapter by global expert, as files hold it: gate and up (or gate_up, which share an A), and down."""

    gate: Mapping[int, LoraMatrix]
    up: Mapping[int, LoraMatrix]
    gate_up: Mapping[int, LoraMatrix]
    down: Mapping[int, LoraMatrix]

    def changed(self, value: float) -> LoraAdapter:
        """The same with every element of every B replaced."""

        def filled(part: Mapping[int, LoraMatrix]) -> dict[int, LoraMatrix]:
            return {e: replace(m, b=torch.full_like(m.b, value)) for e, m in part.items()}

        return LoraAdapter(*(filled(getattr(self, f.name)) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class LoraCase:
    """The operands of one call.

    Attributes:
        layer: without adapters.
        adapters: in the order of their ids.
        lora_ids: `[M]` or `[E_local, max_tokens]` int32, poison behind an expert's count.
        arena: where lora_ids lies.
    """

    layer: ExpertsCase | BatchedCase
    adapters: tuple[LoraAdapter, ...]
    lora_ids: Tensor
    arena: Arena

    @property
    def is_batched(self) -> bool:
        """Whether this is the batched activation format."""
        return isinstance(self.layer, BatchedCase)

    @property
    def num_experts(self) -> int:
        """E, global."""
        return self.layer.num_local_experts if isinstance(self.layer, BatchedCase) else self.layer.num_experts

    @property
    def expert_map(self) -> Tensor | None:
        """`[E]` int32 or None."""
        return None if isinstance(self.layer, BatchedCase) else self.layer.expert_map

    @property
    def max_rank(self) -> int:
        """Of all adapters."""
        return max(
            (m.a.shape[0] for a in self.adapters for f in fields(a) for m in getattr(a, f.name).values()), default=1
        )

    def rows(self, output: Tensor) -> Tensor:
        """The rows of tokens, `[tokens, ...]`, of what has the shape of hidden_states or of lora_ids."""
        return output[self.layer.is_token] if isinstance(self.layer, BatchedCase) else output

    def changed(self) -> list[str]:
        """The operands that no longer hold what they were given, margins included."""
        return [*self.layer.arena.changed(), *self.arena.changed()]

    def operands(self) -> ExpertsOperands:
        """The reference's arguments, with the adapters; a slab's rows as the routed call that says the same."""
        routed = self.layer.routed() if isinstance(self.layer, BatchedCase) else self.layer
        mapping = self.expert_map
        local = {e: e for e in range(self.num_experts)}
        if mapping is not None:
            local = {e: place for e, place in enumerate(mapping.tolist()) if place >= 0}
        return replace(routed.operands(), adapters=self.of_experts(local))

    def of_experts(self, local: Mapping[int, int], *, sees_quantized: bool = False) -> reference.TokenAdapters:
        """The reference's adapters of some experts alone.

        Args:
            local: the index among the weights of each global expert.
            sees_quantized: as the reference says.
        """
        exact = {i: reference_adapter(each, local, self.layer.activation) for i, each in enumerate(self.adapters)}
        return reference.TokenAdapters(exact, self.rows(self.lora_ids).long(), sees_quantized)


def ranks_of(device: str) -> tuple[str, ...]:
    """Names of `RANKS` that are drawn: where kernels are compiled, of those of one width; the others are pinned."""
    drawn = [name for name in RANKS if name not in PINNED_RANKS]
    return tuple(name for name in drawn if name != "wide" or not POOLS[device].is_compiled)


def build_lora(spec: LoraSpec, device: torch.device | str = "cpu") -> LoraCase:
    """The operands of a spec."""
    inner = spec.layer()
    return with_adapters(
        spec, build_batched(inner, device) if isinstance(inner, BatchedSpec) else build_experts(inner, device), device
    )


def with_adapters(spec: LoraSpec, layer: ExpertsCase | BatchedCase, device: torch.device | str = "cpu") -> LoraCase:
    """A layer that is built already with the adapters of a spec."""
    ranks = RANKS[spec.ranks]
    arena = Arena()
    shape = (spec.E, spec.M) if spec.is_batched else (spec.M,)
    ids = integers(spec.seed, "lora_ids", shape, 0, len(ranks), device)
    if spec.tokens == "none":
        ids = torch.full_like(ids, -1)
    elif spec.tokens == "last":
        ids = torch.full_like(ids, len(ranks) - 1)
    elif spec.tokens == "mixed":
        ids = ids.masked_fill(integers(spec.seed, "has_lora", shape, 0, 3, device) == 0, -1)
    ids = ids.to(torch.int32)
    if isinstance(layer, BatchedCase):
        ids = ids.masked_fill(~layer.is_token, 0x7F7F7F7F)
    adapters = tuple(_adapter(spec, index, rank, layer, device) for index, rank in enumerate(ranks))
    return LoraCase(layer, adapters, arena.place("lora_ids", ids), arena)


def _adapter(
    spec: LoraSpec, index: int, rank: int, layer: ExpertsCase | BatchedCase, device: torch.device | str
) -> LoraAdapter:
    dtype = getattr(torch, spec.dtype)
    gated = layer.activation.is_gated
    scale = (0.5, 2.0, 1.25, 0.375)[(index + spec.seed) % 4]

    def matrix(name: str, expert: int, n: int, k: int, r: int) -> LoraMatrix:
        # sqrt(3) of a uniform number on each side, so that s B A x is about as large as W x.
        size = -round(torch.tensor(float(k)).log2().item() / 2)
        where = f"{name} {index} {expert}"
        a = on_grid(spec.seed, f"a {where}", (r, k), dtype, device, exponent=1 + size)
        b = on_grid(spec.seed, f"b {where}", (n, r), dtype, device, exponent=-(r.bit_length() // 2))
        return LoraMatrix(a, torch.zeros_like(b) if spec.adapted == "zero_b" else b, scale)

    some = spec.adapted == "some_experts"
    experts = [e for e in range(spec.E) if spec.adapted != "nothing" and not (some and (e + index) % 3 == 0)]
    shared = spec.adapted == "shared_a" and gated
    has = {
        "gate": not shared and spec.adapted not in ("down_only", "up_only"),
        "up": gated and not shared and spec.adapted not in ("down_only", "gate_only"),
        "gate_up": shared,
        "down": spec.adapted not in ("first_only", "gate_only", "up_only"),
    }
    # Gate and up of different ranks, as rank patterns make them.
    of_up = -(-max(1, rank - index) // spec.multiple) * spec.multiple
    rank = -(-rank // spec.multiple) * spec.multiple
    sizes = {
        "gate": (spec.I, spec.H, rank),
        "up": (spec.I, spec.H, of_up),
        "gate_up": (2 * spec.I, spec.H, rank),
        "down": (spec.H, spec.I, rank),
    }
    return LoraAdapter(
        **{name: {e: matrix(name, e, *size) for e in experts} if has[name] else {} for name, size in sizes.items()}
    )


def pinned_lora(device: str, capabilities: Capabilities) -> tuple[LoraSpec, ...]:
    """Every kind of adapters, tokens and maps, every scheme, both formats, and a call on the path of few pairs."""
    hidden, intermediate = POOLS[device].shapes[2 if device == "cpu" else 0]
    dtype = "bfloat16" if "bfloat16" in capabilities.dtypes else capabilities.dtypes[0]
    plain = LoraSpec(9, hidden, intermediate, 5, 2, dtype=dtype)
    slab = 16 if POOLS[device].is_compiled else 18  # one block of a slab, or two
    specs = [replace(plain, adapted=adapted, seed=seed) for seed, adapted in enumerate(ADAPTED)]
    specs += [replace(plain, tokens=tokens, ranks=ranks) for tokens, ranks in zip(TOKENS, RANKS, strict=False)]
    # More pairs than slots, also where every second slot is empty: blocks list their adapters.
    small = replace(plain, H=POOLS[device].shapes[0][0], I=POOLS[device].shapes[0][1], E=1, top_k=1, tokens="all")
    specs += [replace(small, M=40, ranks="crowd"), replace(small, ranks="large")]
    specs += [replace(plain, expert_map=kind, seed=3) for kind in capabilities.maps if kind != "none"]
    specs += [replace(plain, dtype=other) for other in capabilities.dtypes if other != dtype]
    specs.append(replace(plain, M=3, E=32, ranks="wide"))  # each pair a block of its own
    if POOLS[device].is_compiled:  # larger blocks
        specs.append(replace(plain, M=4 * MEAN_ROWS * plain.E // plain.top_k))
    if capabilities.weight_on_input:
        specs.append(replace(plain, top_k=1, weight_on_input=True, bias=capabilities.biases[-1]))
    if capabilities.empty:
        specs.append(replace(plain, M=0))
    for number, activation in enumerate(capabilities.activations):
        specs.append(replace(plain, activation=activation, ranks="one", seed=number))
    for scheme in capabilities.schemes:
        if SCHEMES[scheme].weight is not None:
            shape = dict(zip(("H", "I", "block_n", "block_k"), POOLS[device].shapes_of(scheme)[0], strict=True))
            specs.append(replace(plain, scheme=scheme, values="spread", **shape))
            if scheme in capabilities.of_slabs().schemes:
                specs.append(replace(plain, scheme=scheme, is_batched=True, M=slab, ranks="one", **shape))
    specs += [replace(plain, is_batched=True, M=slab, adapted=adapted) for adapted in ADAPTED[:3]]
    return tuple(specs)


def lora_specs(device: str, capabilities: Capabilities) -> st.SearchStrategy[LoraSpec]:
    """Layers with adapters of every kind, in both activation formats."""
    pools = POOLS[device]
    dtypes = compiled_dtypes(device, capabilities)

    @st.composite
    def specs(draw: st.DrawFn) -> LoraSpec:
        dtype = draw(st.sampled_from(dtypes))
        is_batched = draw(st.integers(0, 3)) == 0
        can = capabilities.of_slabs() if is_batched else capabilities
        schemes = [s for s in can.schemes if may_go_together(s, "silu", dtype) and dtype in pools.scaled_dtypes]
        scheme = draw(st.sampled_from(schemes)) if schemes and draw(st.booleans()) else "none"
        activations = [a for a in can.activations if may_go_together(scheme, a, dtype)]
        if pools.is_compiled:  # the others are pinned
            activations, scheme = activations[:1], scheme if scheme == "fp8_block" else "none"
        biases = [b for b in can.biases if b in (pools.drawn_biases or can.biases)] or can.biases
        hidden, intermediate, block_n, block_k = draw(st.sampled_from(pools.shapes_of(scheme)))
        # Few rows of an expert are one size of blocks.
        experts = draw(st.sampled_from(pools.experts[3:] if pools.is_compiled and not is_batched else pools.experts))
        routings = [r for r in can.routings if not r.startswith("tile")]
        return LoraSpec(
            M=draw(st.sampled_from((8, 16)) if pools.is_compiled and is_batched else st.integers(1, 20)),
            H=hidden,
            I=intermediate,
            E=experts,
            top_k=draw(st.integers(1, min(experts, 4))),
            ranks=draw(st.sampled_from(ranks_of(device))),
            adapted=draw(st.sampled_from(ADAPTED)),
            tokens=draw(st.sampled_from(TOKENS)),
            is_batched=is_batched,
            dtype=dtype,
            routing=draw(st.sampled_from(routings)),
            expert_map="none" if is_batched else draw(st.sampled_from(can.maps)),
            scheme=scheme,
            block_n=block_n,
            block_k=block_k,
            activation=draw(st.sampled_from(activations)),
            bias=draw(st.sampled_from(biases)),
            values=draw(st.sampled_from(("unit", "large", "spread"))),
            padded_rows=draw(st.booleans()) if can.padded_rows else False,
            seed=draw(SEEDS),
        )

    return specs()
