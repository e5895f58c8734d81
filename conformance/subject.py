"""The implementation under test: what it can do, how it rounds, and the calls that the suite makes.

A subject is one class in a file of its own. It declares its capabilities and numerics and defines the facets that it
has; a facet that it does not define is skipped with that reason, and can never look like a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .cases import AlignCase, BatchedCase, ExpertsCase, LayerCase, QuantizeCase, RoutingCase
from .numerics import Numerics
from .properties.path import Launches
from .spec import (
    CORRECTION_BIASES,
    COUNTS,
    DTYPES,
    GROUP_RANKINGS,
    GROUPS,
    LOGITS,
    MAPS,
    PADDINGS,
    ROUTINGS,
    SCALINGS,
    SCHEMES,
    SCORINGS,
    WEIGHTS,
)

if TYPE_CHECKING:
    from .lora_cases import LoraCase
    from .parallel_cases import ParallelCase
    from .properties.ep import RankResult
    from .properties.lora import LoraLayer
    from .properties.public import PublicCall
    from .shared_cases import SharedCase

FACETS = (
    *("route", "align", "experts", "batched", "quantize", "trace", "launches"),
    *("api", "public", "oracle", "configs", "shared_order", "shared", "capture", "lora", "parallel"),
)


@dataclass(frozen=True)
class Capabilities:
    """What a subject declares that it can do; what is declared must pass, what is not is never asked for.

    Attributes:
        devices: torch device types that it runs on.
        dtypes: of the activations and weights.
        id_dtypes: of the routed ids.
        routings, weights, maps: the names of `spec.py` that it takes.
        counts: of the tokens of each expert in the batched format, by the names of `spec.py`.
        logits: kinds of router logits that its routing takes.
        schemes: how weights are stored and activations quantised, by the names of `spec.py`.
        batched_schemes: those of them in the batched format; None means all.
        activations: between the two GEMMs, by the names of `spec.py`.
        biases: of the two GEMMs, by the names of `spec.py`.
        scorings, groups, group_rankings, correction_biases, scalings, paddings: its routing methods, by the names of
            `spec.py`; where nothing is said, softmax top-k alone.
        weight_on_input: takes routing weights on the experts' input (top_k = 1).
        padded_rows: takes operands whose rows are farther apart than they are wide.
        empty: takes zero tokens.
        overlap: on a GPU its shared experts can run beside the routed ones, on a second stream.
        hidden_multiple, intermediate_multiple: what H and I must be multiples of.
        min_experts: the smallest E.
        max_experts, max_top_k: the largest E and top_k; None: no limit.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = DTYPES
    id_dtypes: tuple[str, ...] = ("int32",)
    routings: tuple[str, ...] = ROUTINGS
    weights: tuple[str, ...] = WEIGHTS
    maps: tuple[str, ...] = MAPS
    counts: tuple[str, ...] = COUNTS
    logits: tuple[str, ...] = LOGITS
    schemes: tuple[str, ...] = ("none",)
    batched_schemes: tuple[str, ...] | None = None
    activations: tuple[str, ...] = ("silu",)
    biases: tuple[str, ...] = ("none",)
    scorings: tuple[str, ...] = ("softmax",)
    groups: tuple[str, ...] = ("none",)
    group_rankings: tuple[str, ...] = ("max",)
    correction_biases: tuple[str, ...] = ("none",)
    scalings: tuple[str, ...] = ("one",)
    paddings: tuple[str, ...] = ("none",)
    weight_on_input: bool = True
    padded_rows: bool = True
    empty: bool = True
    overlap: bool = False
    hidden_multiple: int = 1
    intermediate_multiple: int = 1
    min_experts: int = 1
    max_experts: int | None = None
    max_top_k: int | None = None

    def of_slabs(self) -> Capabilities:
        """What is declared of the batched format."""
        return self if self.batched_schemes is None else replace(self, schemes=self.batched_schemes)

    @property
    def quantizers(self) -> tuple[str, ...]:
        """What quantises activations in the declared schemes, each once (see `QuantizeSpec`)."""
        names = (SCHEMES[scheme].quantizer for scheme in self.schemes)
        return tuple(dict.fromkeys(name for name in names if name is not None))


# What a subject declares that routes in every way.
ROUTING_METHODS: dict[str, tuple[str, ...]] = {
    "scorings": SCORINGS,
    "groups": GROUPS,
    "group_rankings": GROUP_RANKINGS,
    "correction_biases": CORRECTION_BIASES,
    "scalings": tuple(SCALINGS),
    "paddings": PADDINGS,
}


class Subject:
    """Base class of subjects. Define the facets that exist; leave the others as they are.

    Every call takes what its case holds and returns a result of its own: it writes into no operand, keeps nothing for
    the next call, and raises nothing on a case that the capabilities declare. `docs/subject.md` shows one.

    Attributes:
        name: shown in every report.
        variants: names of ways to run it (backends, say) that the suite runs side by side.
        capabilities: what it declares.
        numerics: its rounding points, by which its error budget is derived.
        deviations: for each rounding point that is looser than the default declaration, the reason.
        launches: by variant, the kernels that each path launches; judged where declared (needs `trace`).
        partial_sums: by the names of exchanges, in what the ranks' parts of a token's sum are added: the activations'
            dtype (`storage`), or float32 and rounded once.
        standalone: the lines of a function `run(hidden_states, w13, w2, topk_weights, topk_ids, **more)` that calls the
            implementation without moegate, for `--emit-repro`; empty: the script has what was returned.
        last_run: the version and date that this adapter of another project was last run with, for the report.
    """

    name: ClassVar[str] = ""
    variants: ClassVar[tuple[str, ...]] = ("default",)
    capabilities: ClassVar[Capabilities] = Capabilities()
    numerics: ClassVar[Numerics] = Numerics()
    deviations: ClassVar[dict[str, str]] = {}
    launches: ClassVar[Mapping[str, Launches]] = {}
    partial_sums: ClassVar[Mapping[str, str]] = {"all_gather": "storage", "all_to_all": "float32"}
    standalone: ClassVar[str] = ""
    last_run: ClassVar[str] = ""

    def unavailable(self, variant: str, device: str) -> str | None:
        """Why `variant` cannot run on `device` in this process (not installed, say); None where it can."""
        if device not in self.capabilities.devices:
            return f"{self.name} declares devices {list(self.capabilities.devices)}, not {device}"
        return None

    def facets(self, variant: str) -> tuple[str, ...]:
        """The facets that this subject defines; override it where a variant lacks one."""
        del variant
        return tuple(f for f in FACETS if getattr(type(self), f) is not getattr(Subject, f))

    def prepare(self, case: LayerCase, variant: str) -> Any:
        """What is made of a layer's weights once, before any call: shuffled, merged, moved into a module.

        `experts` and `batched` find it in `case.prepared`, and may be called with it several times.
        """
        del case, variant

    def route(self, case: RoutingCase, variant: str) -> tuple[Tensor, Tensor]:
        """`topk_weights [M, top_k]` float32 and `topk_ids [M, top_k]` int32 by the method that the case says."""
        raise NotImplementedError

    def align(self, case: AlignCase, variant: str) -> tuple[Tensor, Tensor, Tensor]:
        """Routed pairs sorted into blocks of one expert each.

        Returns:
            `sorted_token_ids` int32, flat pair indices by block, padded with M * top_k;
            `expert_ids` int32, the local expert of each block, -1 for blocks that hold nothing;
            `num_tokens_post_padded` int32 `[1]`, the rows in use.
        """
        raise NotImplementedError

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """The routed experts' weighted sum, `[M, H]` in the dtype of `hidden_states`."""
        raise NotImplementedError

    def batched(self, case: BatchedCase, variant: str, out: Tensor | None) -> Tensor:
        """Each token of the batched format through its expert, `[E_local, max_tokens, H]`.

        Args:
            case: the operands.
            variant: of the subject.
            out: what to write into and to return (rows behind an expert's count stay as they were); None asks for a
                result of the subject's own, with zeros there.
        """
        raise NotImplementedError

    def quantize(self, case: QuantizeCase, variant: str) -> tuple[Tensor, Tensor]:
        """Activations in few bits.

        Returns:
            `[rows, K]` of `case.how.dtype`, and float32 scales: `[1]` (of the whole tensor, or given), `[rows, 1]` (of
            a token) or `[rows, ceil(K / group)]`.
        """
        raise NotImplementedError

    def trace(self) -> AbstractContextManager[Any]:
        """A context whose value, after a call inside it, has `last(name)` and `launches` as `impl.path` has them."""
        raise NotImplementedError

    def api(self) -> dict[str, Any]:
        """The public functions whose handling of bad input is checked, by name."""
        raise NotImplementedError

    def public(self) -> Sequence[PublicCall]:
        """Every public function and class, each with a call that is right and what its arguments may be."""
        raise NotImplementedError

    def oracle(self) -> Any:
        """The backend oracle."""
        raise NotImplementedError

    def configs(self) -> Any:
        """The lookup of tuned kernel configurations."""
        raise NotImplementedError

    def shared_order(self) -> Any:
        """The decision when a layer's shared experts run."""
        raise NotImplementedError

    def shared(self, case: SharedCase, variant: str, *, overlapped: bool, hold: Callable[[str], None] | None) -> Tensor:
        """Routed plus shared output, `[M, H]` in the dtype of `hidden_states`.

        Args:
            case: the operands.
            variant: of the subject.
            overlapped: the shared experts run beside the routed ones (asked on a GPU, where `overlap` is declared);
                else one after the other.
            hold: called with each of `before_shared` and `after_shared`, with the shared experts' stream the current
                one, and of `before_routed` and `after_routed`, with the caller's; None: nothing is.
        """
        raise NotImplementedError

    def capture(self, case: SharedCase, variant: str) -> Callable[[], Tensor]:
        """A layer with shared experts as a call that a CUDA graph can capture once it has run.

        It is prepared once. Each call reads the operands where they lie, whatever was written there since, and
        enqueues work without waiting for any; on a GPU, on two streams where `overlap` is declared.
        """
        raise NotImplementedError

    def lora(self, case: LoraCase, num_slots: int, variant: str) -> LoraLayer:
        """The case's layer with slots for adapters of at most its largest rank, all of them empty."""
        raise NotImplementedError

    def parallel(self, case: ParallelCase, links: Any, variant: str, *, fails: tuple[int, str] | None) -> RankResult:
        """One rank's part of a layer that ranks share; every rank is asked for its own, at the same time.

        Args:
            case: the operands of all ranks, of which a rank may read its own tokens, and the weights that it holds.
            links: to the other ranks: `rank`, `size`, and `channel(ranks)`, which has `all_gather`, `reduce_scatter`,
                `all_reduce` and `all_to_all` (see `simulated_ranks.Channel`); with real processes `process_group`,
                which is None otherwise, and `remembered(key, make)` for what is made once.
            variant: of the subject.
            fails: the rank that raises a ValueError, and in which step of its layer: `routing` or `experts`. All ranks
                are told, and then run in debug mode. None: nobody.
        """
        raise NotImplementedError
