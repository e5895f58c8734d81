"""Specs: small frozen values that say what a case is. Strategies draw them, and a failure shrinks to one line of them.

A spec holds counts, names and a seed, never a tensor; `cases.py` builds the same tensors from it on every device.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import combinations
from typing import Any, ClassVar, Literal, get_type_hints

DTYPES = ("bfloat16", "float16", "float32")
TILE = 16

ROUTINGS = (
    "uniform",  # distinct experts, each token its own
    "one_expert",  # every token goes to the same top_k experts
    "empty_expert",  # expert 0 gets nothing
    "tile_minus_1",  # expert 0 gets one pair fewer than a tile (of 16 rows, or an alignment's block) ...
    "tile",  # ... exactly a tile ...
    "tile_plus_1",  # ... and one more
    "skewed",  # half of the tokens to one expert
    "repeated",  # a token may list an expert twice
    "some_invalid",  # some ids are -1
    "all_invalid",  # every id is -1
)
WEIGHTS = (
    "softmax",  # positive, summing to 1
    "scaled",  # positive, summing to 2.5
    "one_zero",  # the first slot's weight is zero
    "spread",  # exponents spread over 2**-8 .. 1
    "signed",  # every second one negative
)
MAPS = (
    "none",
    "linear",  # a contiguous slice of the experts
    "round_robin",  # every second expert
    "arbitrary",  # a hashed subset in a hashed order
    "owns_all",  # a permutation of all
    "owns_nothing",  # a rank without a single routed expert
)
VALUES = (
    "unit",  # activations of order 1
    "large",  # gates that saturate the activation
    "asymmetric",  # up rows 16 times gate rows
    "spread",  # exponents spread over 2**-6 .. 1
    "tiny",  # everything small
    "zero_rows",  # a quarter of the tokens are zero, and half are zero in their first columns
    "extreme",  # gates beyond -88 and 88, where exp overflows float32; in float16 as large ones
)
BIASES = (
    "none",
    "both",  # of both GEMMs, in the activations' dtype
    "both_float32",
    "w13",  # of the first GEMM alone
    "w2",  # of the second alone
)


@dataclass(frozen=True)
class Scheme:
    """How weights are stored and activations quantised, by its name in a spec.

    Attributes:
        weight: the format of stored weights; None where they are of the activations' dtype.
        weight_scale: what shares a scale: an expert, an output channel, a block, a group along K.
        activation_scale: what shares a scale of the activations; None where they are not quantised.
        zero_points: int4 with a zero for each group, and not 8 everywhere.
    """

    weight: Literal["fp8", "int8", "int4"] | None = None
    weight_scale: Literal["tensor", "channel", "block", "group"] = "tensor"
    activation_scale: Literal["static", "tensor", "token", "group"] | None = None
    zero_points: bool = False

    @property
    def quantizer(self) -> str | None:
        """What quantises its activations, by a name of `QuantizeSpec`; None where nothing does."""
        return None if self.activation_scale is None else f"{self.weight}_{self.activation_scale}"

    @property
    def has_blocks(self) -> bool:
        """Whether a spec says how large its blocks or groups are."""
        return self.weight_scale in ("block", "group")


SCHEMES = {
    "none": Scheme(),
    "fp8_tensor_static": Scheme("fp8", "tensor", "static"),
    "fp8_tensor": Scheme("fp8", "tensor", "tensor"),
    "fp8_tensor_token": Scheme("fp8", "tensor", "token"),
    "fp8_channel_token": Scheme("fp8", "channel", "token"),
    "fp8_block": Scheme("fp8", "block", "group"),
    "int8_channel_token": Scheme("int8", "channel", "token"),
    "int8_w8a16_channel": Scheme("int8", "channel"),
    "int8_w8a16_group": Scheme("int8", "group"),
    "int4_group": Scheme("int4", "group"),
    "int4_group_zp": Scheme("int4", "group", zero_points=True),
}
# Activations by their names in a spec: the reference's name and what differs from its defaults.
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("silu", {}),
    "gelu": ("gelu", {}),
    "gelu_tanh": ("gelu_tanh", {}),
    "swigluoai": ("swigluoai", {}),
    "swigluoai_interleaved": ("swigluoai", {"interleaved": True}),
    "swigluoai_tight": ("swigluoai", {"alpha": 1.25, "limit": 1.5}),  # most elements meet a clamp
    "silu_no_mul": ("silu_no_mul", {}),
    "gelu_no_mul": ("gelu_no_mul", {}),
    "relu2_no_mul": ("relu2_no_mul", {}),
}
COUNTS = (
    "zero",  # no expert has a token
    "full",  # every slab is full
    "tile_minus_1",  # expert 0 has one token fewer than a tile of 16 rows ...
    "tile",  # ... exactly a tile ...
    "tile_plus_1",  # ... and one more
    "one_expert",  # the last expert has all tokens
    "uneven",  # each its own number, from none to all rows
)
ROWS = (
    "unit",
    "spread",  # exponents over the whole range of the format, subnormals among them
    "zero_rows",  # some rows, and some groups, without any value
    "ties",  # every value exactly between two numbers of the format, and a scale that is a power of two
)
LOGITS = (
    "unit",
    "wide",  # differences that saturate the softmax
    "ties",  # a few distinct values only, ties everywhere
    "tie_at_k",  # the k-th and the next score are bit-equal
    "equal",  # one value
    "negative",  # all far below zero
    "nan_rows",
    "infinite_rows",
    "saturating",  # a float32 sigmoid is 1 for all of them, and differs from the next in float64 alone
    "equal_groups",  # every group has the logits of the first
)
SCORINGS = (
    "softmax",
    "sigmoid",
    "sqrtsoftplus",
    "custom",  # a function of the caller's, whose answer has nothing to do with the logits
)
GROUPS = (
    "none",
    "some",  # about half of the groups are kept
    "one_kept",
    "all_kept",  # which is no restriction
    "one_group",  # a single group, and nothing is left out
    "singletons",  # groups of one expert
)
GROUP_RANKINGS = (
    "max",  # a group is worth its best expert (DeepSeek-V2) ...
    "top2_sum",  # ... or the sum of its best two (DeepSeek-V3)
)
CORRECTION_BIASES = (
    "none",
    "equal",  # one value for every expert
    "unit",
    "bfloat16",  # as unit, and stored in bfloat16
    "reverses",  # so widely spread that it alone decides
    "ties",  # a few distinct values, so that where logits tie too, score plus bias does
    "negative",  # far below zero, and so is every score plus bias
)
SCALINGS = {
    "one": 1.0,
    "above_one": 2.5,
    "below_one": 0.3125,
}
PADDINGS = (
    "none",
    "no_token",  # a number of real tokens is given, and it is all of them
    "some",  # the last third is padding
    "all_tokens",
)


@dataclass(frozen=True)
class Spec:
    """What every spec shares: its features, and the line that replays it."""

    # Fields that say how large a case is; the others are features, whose pairs the coverage counts.
    SIZES: ClassVar[frozenset[str]] = frozenset(
        {
            "M",
            "H",
            "I",
            "E",
            "top_k",
            "block_size",
            "max_tokens",
            "block_n",
            "block_k",
            "rows",
            "columns",
            "group",
            "seed",
        }
    )

    # The facet of a subject that runs such a spec.
    facet: ClassVar[str] = ""
    # Whether the coverage of feature pairs counts such a spec: it counts what experts and their kernels computed alone.
    is_covered: ClassVar[bool] = True
    kinds: ClassVar[dict[str, type[Spec]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Spec.kinds[cls.__name__] = cls

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """In Hypothesis's words too a spec is the one line that replays it."""
        del cycle
        printer.text(repr(self))

    def features(self) -> dict[str, Any]:
        """The features by name; none where pairs of them are not counted."""
        if not self.is_covered:
            return {}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.SIZES}

    def feature_pairs(self) -> Iterator[tuple[str, str]]:
        """Every pair of features, as `name=value` strings."""
        named = [f"{name}={value}" for name, value in sorted(self.features().items())]
        return combinations(named, 2)


@dataclass(frozen=True)
class RoutingSpec(Spec):
    """One call of the routing."""

    facet: ClassVar[str] = "route"

    M: int
    E: int
    top_k: int
    dtype: str = "float32"
    logits: str = "unit"
    renormalize: bool = True
    padded_rows: bool = False
    seed: int = 0
    scoring: str = "softmax"
    groups: str = "none"
    group_ranking: str = "max"
    correction_bias: str = "none"
    scaling: str = "one"
    padding: str = "none"

    def group_counts(self) -> tuple[int, int]:
        """How many groups of consecutive experts there are, and how many are kept; (0, 0) where E has no such groups.

        Groups of "some", "one_kept" and "all_kept" are as many as there can be up to 8, of two experts or more.
        """
        if self.groups in ("none", "one_group"):
            return 1, 1
        if self.groups == "singletons":
            return self.E, (self.E + 1) // 2
        count = max((n for n in range(2, 9) if self.E % n == 0 and self.E // n >= 2), default=0)
        return count, {"some": (count + 1) // 2, "one_kept": min(count, 1), "all_kept": count}[self.groups]

    def most_choices(self) -> int:
        """The largest top_k that these groups allow; 0 where E, scoring and ranking do not go with them."""
        count, kept = self.group_counts()
        size = self.E // count if count else 0
        too_small = self.group_ranking == "top2_sum" and size < 2
        alone = self.groups == "none" and self.group_ranking != "max"
        decides_alone = self.scoring == "custom" and (self.groups != "none" or self.correction_bias != "none")
        return 0 if too_small or alone or decides_alone else kept * size

    def is_plain(self) -> bool:
        """Whether the method is softmax top-k and nothing else."""
        return (self.scoring, self.groups, self.correction_bias) == ("softmax", "none", "none")


@dataclass(frozen=True)
class AlignSpec(Spec):
    """One alignment of routed pairs to blocks."""

    facet: ClassVar[str] = "align"

    M: int
    E: int
    top_k: int
    block_size: int = 16
    routing: str = "uniform"
    expert_map: str = "none"
    seed: int = 0


@dataclass(frozen=True)
class ExpertsSpec(Spec):
    """One call of the routed experts; `block_n` and `block_k` are of the blocks (0 and g of the groups) of scales."""

    facet: ClassVar[str] = "experts"

    M: int
    H: int
    I: int
    E: int
    top_k: int
    dtype: str = "bfloat16"
    routing: str = "uniform"
    weights: str = "softmax"
    expert_map: str = "none"
    values: str = "unit"
    weight_on_input: bool = False
    padded_rows: bool = False
    scheme: str = "none"
    block_n: int = 0
    block_k: int = 0
    activation: str = "silu"
    bias: str = "none"
    seed: int = 0

    def features(self) -> dict[str, Any]:
        """The features by name, with the activation format and the path that the table says."""
        return super().features() | {"format": "standard", "path": "naive" if self.takes_naive_blocks else "aligned"}

    @property
    def takes_naive_blocks(self) -> bool:
        """vLLM PR 39016's condition: few pairs, no expert map, no weights grouped along K."""
        few = self.M * self.top_k * 4 <= self.E
        return few and self.expert_map == "none" and SCHEMES[self.scheme].weight_scale != "group"


@dataclass(frozen=True)
class BatchedSpec(Spec):
    """One call of the experts in the batched activation format; E counts the local experts."""

    facet: ClassVar[str] = "batched"

    max_tokens: int
    H: int
    I: int
    E: int
    dtype: str = "bfloat16"
    counts: str = "uneven"
    values: str = "unit"
    padded_rows: bool = False
    scheme: str = "none"
    block_n: int = 0
    block_k: int = 0
    activation: str = "silu"
    bias: str = "none"
    seed: int = 0

    def features(self) -> dict[str, Any]:
        """The features by name, with the activation format."""
        return super().features() | {"format": "batched"}


@dataclass(frozen=True)
class QuantizeSpec(Spec):
    """One quantisation of activations; `quantizer` is a format and what shares a scale, such as `fp8_token`."""

    facet: ClassVar[str] = "quantize"

    rows: int
    columns: int
    quantizer: str
    group: int = 0
    dtype: str = "bfloat16"
    values: str = "unit"
    padded_rows: bool = False
    seed: int = 0


# Where the specs are that this module does not know: each enters `Spec.kinds` when it is imported.
_OF_OTHER_KINDS = ("configs", "lora_cases", "oracle", "parallel_cases", "shared_cases", "shared_order")
# Of a spec's line; the longest that a failure prints is a tenth of it.
MOST_CHARACTERS = 10_000


def parse_spec(line: str) -> Spec:
    """The spec that a failure printed, from its line; nothing in the line is evaluated but literals.

    Raises:
        ValueError: not a spec, an unknown field, or a value that is not a literal.
    """
    if not isinstance(line, str):
        raise TypeError(f"spec: expected a line such as AlignSpec(M=1, E=2, top_k=1), got {type(line).__name__}")
    for module in _OF_OTHER_KINDS:
        import_module(f".{module}", __package__)
    try:
        if len(line) > MOST_CHARACTERS:
            raise ValueError("too long")
        call = ast.parse(line.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"spec: expected a line such as AlignSpec(M=1, E=2, top_k=1), got {line!a:.200}") from error
    if not (
        isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in Spec.kinds and not call.args
    ):
        raise ValueError(f"spec: expected one of {sorted(Spec.kinds)} with named fields, got {line!a:.200}")
    cls = Spec.kinds[call.func.id]
    known = {f.name for f in fields(cls)}
    values = {}
    for keyword in call.keywords:
        if keyword.arg not in known:
            raise ValueError(f"spec: expected fields of {call.func.id}, {sorted(known)}, got {keyword.arg!a:.80}")
        if keyword.arg in values:
            raise ValueError(f"spec: expected each field once, got {keyword.arg} again")
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            got = ast.get_source_segment(line.strip(), keyword.value) or ""
            raise ValueError(f"spec: expected a literal for {keyword.arg}, got {ascii(got)[1:-1]:.80}") from error
    hints = get_type_hints(cls)
    for name, value in values.items():
        if hints[name] in (int, str, bool, float) and type(value) is not hints[name]:
            raise ValueError(f"spec: expected a {hints[name].__name__} for {name}, got {value!a:.80}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"spec: expected other fields, got {line!a:.200}: {error}") from error
