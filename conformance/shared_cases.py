"""Cases of a layer with shared experts: a spec, its operands, and how both are drawn.

The routing is given, as weights without their scaling factor and ids, so that no rounding of a score decides which
expert a token goes to. The shared experts are one more call, of one expert to which every token goes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..reference.shared import shared_gate
from .arena import Arena
from .cases import ExpertsCase, build_experts
from .operands import ExpertsOperands
from .spec import SCALINGS, SCHEMES, ExpertsSpec, Spec
from .strategies import POOLS, SEEDS, compiled_dtypes
from .subject import Capabilities
from .values import on_grid

# How shared experts are stored here, of what a subject declares: as the activations, and in two ways of 8 bits.
SHARED_SCHEMES = ("none", "fp8_channel_token", "fp8_block")
# Of small layers, and of those on a GPU, whose kernels routed experts have had compiled.
BLOCK, LARGE_BLOCK = (32, 32), (128, 128)
# Of kinds of values: one of each size.
SHARED_VALUES = ("unit", "large", "tiny", "spread")


@dataclass(frozen=True)
class SharedSpec(Spec):
    """One call of a layer with shared experts.

    Attributes:
        shared_size: intermediate size of the shared experts.
        shared_scheme: how they are stored; routed experts are of the activations' dtype.
        gated: a sigmoid gate multiplies their output.
        scaling: of the routing weights, by a name of `SCALINGS`.
    """

    facet: ClassVar[str] = "shared"
    is_covered: ClassVar[bool] = False

    M: int
    H: int
    I: int
    E: int
    top_k: int
    shared_size: int
    dtype: str = "bfloat16"
    routing: str = "uniform"
    weights: str = "softmax"
    values: str = "unit"
    shared_scheme: str = "none"
    gated: bool = False
    scaling: str = "one"
    padded_rows: bool = False
    seed: int = 0

    def routed(self) -> ExpertsSpec:
        """The routed experts' part."""
        names = ("M", "H", "I", "E", "top_k", "dtype", "routing", "weights", "values", "padded_rows", "seed")
        return ExpertsSpec(**{name: getattr(self, name) for name in names})

    def shared(self) -> ExpertsSpec:
        """The shared experts' part, with weights of its own."""
        is_large = self.H > 128
        block = LARGE_BLOCK if is_large else BLOCK
        block_n, block_k = block if SCHEMES[self.shared_scheme].has_blocks else (0, 0)
        return replace(
            self.routed(),
            I=self.shared_size,
            E=1,
            top_k=1,
            routing="uniform",
            weights="softmax",
            scheme=self.shared_scheme,
            block_n=block_n,
            block_k=block_k,
            seed=self.seed + 256,
        )


@dataclass(frozen=True)
class SharedCase:
    """The operands of one call.

    Attributes:
        routed: of the routed experts, its routing weights without the scaling factor.
        shared: of the shared experts as one expert, E = top_k = 1, with the same hidden states and weights of 1.
        gate: `[1, H]` float32 of the sigmoid gate, or None.
        routed_scaling_factor: multiplies the routing weights in float32, and nothing else.
        arena: where the gate lies; each part has its own.
    """

    routed: ExpertsCase
    shared: ExpertsCase
    gate: Tensor | None
    routed_scaling_factor: float
    arena: Arena

    @property
    def hidden_states(self) -> Tensor:
        """`[M, H]`."""
        return self.routed.hidden_states

    def tensors(self) -> dict[str, Tensor]:
        """Every operand that is a tensor, by name."""
        own = {f"shared_{name}": t for name, t in self.shared.tensors().items()}
        gate = {} if self.gate is None else {"shared_gate": self.gate}
        return self.routed.tensors() | own | gate

    def changed(self) -> list[str]:
        """The operands that no longer hold what they were given, margins included."""
        return [
            *self.routed.arena.changed(),
            *(f"shared_{name}" for name in self.shared.arena.changed()),
            *self.arena.changed(),
        ]

    def operands(self) -> tuple[ExpertsOperands, ExpertsOperands]:
        """The reference's arguments: of the routed experts, and of the shared ones as one expert with its gate."""
        factor = torch.tensor(self.routed_scaling_factor, device=self.hidden_states.device)
        gate = shared_gate(self.hidden_states, self.gate)[:, None]
        return (
            replace(self.routed.operands(), topk_weights=self.routed.topk_weights * factor),
            replace(self.shared.operands(), topk_weights=gate),
        )


def build_shared(spec: SharedSpec, device: torch.device | str = "cpu") -> SharedCase:
    """The operands of a spec."""
    routed = build_experts(spec.routed(), device)
    arena = Arena()
    gate = None
    if spec.gated:
        gate = arena.place("gate", on_grid(spec.seed, "shared_gate", (1, spec.H), torch.float32, device, exponent=-3))
    ones = torch.ones((spec.M, 1), dtype=torch.float32, device=device)
    shared = replace(build_experts(spec.shared(), device), hidden_states=routed.hidden_states, topk_weights=ones)
    return SharedCase(routed, shared, gate, SCALINGS[spec.scaling], arena)


def first_tokens(case: SharedCase, count: int) -> SharedCase:
    """The same layer on the first tokens alone, which are copied."""
    hidden_states = case.hidden_states[:count].clone()
    routed = replace(
        case.routed,
        hidden_states=hidden_states,
        topk_weights=case.routed.topk_weights[:count].clone(),
        topk_ids=case.routed.topk_ids[:count].clone(),
    )
    weights, ids = case.shared.topk_weights[:count], case.shared.topk_ids[:count]
    shared = replace(case.shared, hidden_states=hidden_states, topk_weights=weights, topk_ids=ids)
    return replace(case, routed=routed, shared=shared)


def _schemes(capabilities: Capabilities, dtype: str) -> list[str]:
    return [name for name in SHARED_SCHEMES if name in capabilities.schemes and (name == "none" or dtype != "float32")]


def _scalings(capabilities: Capabilities) -> tuple[str, ...]:
    return capabilities.scalings if len(capabilities.scalings) > 1 else ("one",)


def _sizes(device: str, intermediate: int) -> tuple[int, ...]:
    """Intermediate sizes of shared experts; on a GPU of those whose kernels routed experts have had compiled."""
    return (16, 72, 48) if device == "cpu" else (intermediate,)


def pinned_shared(device: str, capabilities: Capabilities) -> tuple[SharedSpec, ...]:
    """Every dtype with every scheme, with a gate and without; a call without tokens, and one without routed experts.

    Where kernels are compiled, schemes of few bits are beside one dtype.
    """
    hidden, intermediate = POOLS[device].shapes[0]
    plain = SharedSpec(5, hidden, intermediate, 8, 2, _sizes(device, intermediate)[-1], capabilities.dtypes[0])
    kinds = [
        (dtype, gated, scheme)
        for dtype, gated in product(capabilities.dtypes, (False, True))
        for scheme in _schemes(capabilities, dtype)
        if scheme == "none" or dtype in compiled_dtypes(device, capabilities)
    ]
    scalings = _scalings(capabilities)
    base = [
        replace(plain, dtype=dtype, gated=gated, shared_scheme=scheme, scaling=scalings[number % len(scalings)])
        for number, (dtype, gated, scheme) in enumerate(kinds)
    ]
    if "all_invalid" in capabilities.routings:
        base.append(replace(plain, routing="all_invalid"))
    if capabilities.empty:
        base.append(replace(plain, M=0))
    return tuple(base)


def shared_specs(device: str, capabilities: Capabilities) -> st.SearchStrategy[SharedSpec]:
    """Layers with shared experts of every size beside the routed ones."""
    pools = POOLS[device]

    @st.composite
    def specs(draw: st.DrawFn) -> SharedSpec:
        dtype = draw(st.sampled_from(compiled_dtypes(device, capabilities)))
        hidden, intermediate, _, _ = draw(st.sampled_from(pools.shapes_of()))
        schemes = _schemes(capabilities, dtype)
        if pools.is_compiled:
            schemes = schemes[:1]  # the others are pinned
        experts = draw(st.sampled_from(pools.experts))
        routings = [r for r in capabilities.routings if not r.startswith("tile")]
        return SharedSpec(
            M=draw(st.integers(0 if capabilities.empty else 1, pools.max_tokens)),
            H=hidden,
            I=intermediate,
            E=experts,
            top_k=draw(st.integers(1, min(experts, 4))),
            shared_size=draw(st.sampled_from(_sizes(device, intermediate))),
            dtype=dtype,
            routing=draw(st.sampled_from(routings)),
            weights=draw(st.sampled_from(capabilities.weights)),
            values=draw(st.sampled_from(SHARED_VALUES)),
            shared_scheme=draw(st.sampled_from(schemes)),
            gated=draw(st.booleans()),
            scaling=draw(st.sampled_from(_scalings(capabilities))),
            padded_rows=draw(st.booleans()) if capabilities.padded_rows else False,
            seed=draw(SEEDS),
        )

    return specs()
