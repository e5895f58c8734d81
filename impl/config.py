"""What a MoE layer is and how it is spread over ranks: frozen values that validate themselves.

The words are the field's own: M tokens, H hidden size, I intermediate size, E global experts, top_k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch


class Activation(StrEnum):
    """The activation between the two GEMMs; gated ones take w13's gate and up rows."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SWIGLUOAI = "swigluoai"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"

    @property
    def is_gated(self) -> bool:
        """Whether w13 holds gate rows and up rows (2I in all) or I rows only."""
        return not self.value.endswith("_no_mul")


@dataclass(frozen=True)
class ActivationFunction:
    """An activation with its parameters and the order of w13's rows.

    Attributes:
        kind: which.
        alpha: of swigluoai: min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clamp(up, -limit, limit) + 1)
            (gpt-oss, arXiv 2508.10925 and its model code).
        limit: of swigluoai.
        interleaved: gate and up rows alternate, instead of all gate rows coming first.
    """

    kind: Activation = Activation.SILU
    alpha: float = 1.702
    limit: float = 7.0
    interleaved: bool = False

    @cached_property
    def rows_a_column(self) -> int:
        """Rows of w13 for each column of the activation's result: 2 where gated, else 1."""
        return 2 if self.kind.is_gated else 1


class QuantScheme(StrEnum):
    """How the experts' weights (w) and activations (a) are stored."""

    NONE = "none"
    FP8_W8A8 = "fp8_w8a8"
    INT8_W8A8 = "int8_w8a8"
    INT8_W8A16 = "int8_w8a16"
    INT4_W4A16 = "int4_w4a16"


class ActivationFormat(StrEnum):
    """How tokens reach the experts: `[M, H]`, or `[E_local, max_tokens, H]` with a count for each expert."""

    STANDARD = "standard"
    BATCHED = "batched"


def _expect_positive(**sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name}: expected an int, got {type(size).__name__} {size!r}")
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def _expect_rank(name: str, rank: int, size: int) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"{name}_rank: expected an int, got {type(rank).__name__} {rank!r}")
    if not 0 <= rank < size:
        raise ValueError(f"{name}_rank: expected a rank in [0, {size}) for {name}_size {size}, got {rank}")


def expect_block_shape(scheme: QuantScheme, block_shape: Any) -> tuple[int, int] | None:
    """Check the shape of a scheme's blocks or groups of weight scales.

    Args:
        scheme: which.
        block_shape: (bn, bk) of blocks, (0, g) of groups along K, None otherwise.

    Returns:
        It as a tuple.

    Raises:
        ValueError: no two integers, a shape that the scheme does not have, or columns that 16 does not divide: a step
            of a kernel along K divides them, and has at least 16.
    """
    groups = scheme in (QuantScheme.INT8_W8A16, QuantScheme.INT4_W4A16)
    if block_shape is None:
        if scheme is QuantScheme.INT4_W4A16:
            raise ValueError(f"block_shape: expected (0, group) for scheme {scheme}, got None")
        return None
    if scheme in (QuantScheme.NONE, QuantScheme.INT8_W8A8):
        raise ValueError(f"block_shape: expected None for scheme {scheme}, got {block_shape}")
    if (
        not isinstance(block_shape, (tuple, list))
        or len(block_shape) != 2
        or any(type(size) is not int or size < 0 for size in block_shape)
    ):
        raise ValueError(f"block_shape: expected two integers of at least 0, got {block_shape!r}")
    rows, columns = block_shape
    if groups != (rows == 0):
        wanted = "(0, group)" if groups else "(rows, columns) of at least one row"
        raise ValueError(f"block_shape: expected {wanted} for scheme {scheme}, got {tuple(block_shape)}")
    if columns < 16 or columns % 16:
        raise ValueError(f"block_shape: expected columns that 16 divides, got {columns} in {tuple(block_shape)}")
    return rows, columns


def _as_member(enum: type[StrEnum], name: str, value: Any) -> Any:
    try:
        return enum(value)
    except ValueError:
        raise ValueError(f"{name}: expected one of {[m.value for m in enum]}, got {value!r}") from None


@dataclass(frozen=True)
class ParallelConfig:
    """The layer's place among the ranks.

    Attributes:
        tp_size: ranks that share each expert's I columns (tensor parallelism); `tp_rank` is this one's number.
        dp_size: ranks with their own tokens (data parallelism).
        ep_size: ranks that share the experts (expert parallelism).

    Raises:
        TypeError, ValueError: a size under 1, or a rank outside its size, by name.
    """

    tp_size: int = 1
    tp_rank: int = 0
    dp_size: int = 1
    dp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0

    def __post_init__(self) -> None:
        _expect_positive(tp_size=self.tp_size, dp_size=self.dp_size, ep_size=self.ep_size)
        _expect_rank("tp", self.tp_rank, self.tp_size)
        _expect_rank("dp", self.dp_rank, self.dp_size)
        _expect_rank("ep", self.ep_rank, self.ep_size)


@dataclass(frozen=True)
class MoEConfig:
    """One MoE layer of a model.

    Attributes:
        num_experts: E, the global number of routed experts.
        top_k: experts chosen for each token.
        hidden_size: H.
        intermediate_size: the model's intermediate size of one expert, before tensor parallelism divides it.
        dtype: of activations and unquantised weights: bfloat16, float16 or float32.
        scheme: how weights and activations are quantised.
        block_shape: (n, k) of block-wise weight scales, (0, group) of scales grouped along K, None otherwise. No shard
            of tensor parallelism cuts a block, and groups divide both H and I.
        activation: between the two GEMMs.
        activation_format: how tokens reach the experts.
        apply_router_weight_on_input: routing weights multiply the experts' input instead of their output (top_k = 1).
        is_lora_enabled: LoRA adapters may be applied to the experts.
        has_bias: the experts' GEMMs add biases.
        parallel: this rank's place.
        expert_map: for each global expert its local id on this rank, -1 where another rank owns it; None for the
            linear placement, by which rank r owns the r-th run of experts and the first ranks take the remainder.

    Raises:
        TypeError, ValueError: a field out of its range, or fields that contradict each other, by name.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype = torch.bfloat16
    scheme: QuantScheme = QuantScheme.NONE
    block_shape: tuple[int, int] | None = None
    activation: Activation = Activation.SILU
    activation_format: ActivationFormat = ActivationFormat.STANDARD
    apply_router_weight_on_input: bool = False
    is_lora_enabled: bool = False
    has_bias: bool = False
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    expert_map: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _expect_positive(
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
        )
        for name, enum in (
            ("scheme", QuantScheme),
            ("activation", Activation),
            ("activation_format", ActivationFormat),
        ):
            object.__setattr__(self, name, _as_member(enum, name, getattr(self, name)))
        for name in ("apply_router_weight_on_input", "is_lora_enabled", "has_bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if not isinstance(self.parallel, ParallelConfig):
            raise TypeError(f"parallel: expected a ParallelConfig, got {self.parallel!r}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: expected at most num_experts {self.num_experts}, got {self.top_k}")
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {self.dtype}")
        if self.intermediate_size % self.parallel.tp_size:
            raise ValueError(
                f"tp_size: expected a divisor of intermediate_size {self.intermediate_size}, "
                f"got {self.parallel.tp_size}"
            )
        if self.apply_router_weight_on_input and self.top_k != 1:
            raise ValueError(f"apply_router_weight_on_input: expected top_k 1, got {self.top_k}")
        if self.scheme is not QuantScheme.NONE and self.dtype is torch.float32:
            raise ValueError(f"dtype: expected bfloat16 or float16 for scheme {self.scheme}, got {self.dtype}")
        object.__setattr__(self, "block_shape", expect_block_shape(self.scheme, self.block_shape))
        self._check_shards()
        self._check_placement()

    def _check_shards(self) -> None:
        """A rank holds whole groups always, and whole blocks where the model's are cut into shards."""
        if self.block_shape is None:
            return
        rows, columns = self.block_shape
        size, shards = self.intermediate_size_per_partition, self.parallel.tp_size
        if rows == 0 and self.hidden_size % columns:
            raise ValueError(
                f"block_shape: expected groups that divide hidden_size {self.hidden_size}, got {self.block_shape}"
            )
        if rows == 0 and shards == 1 and size % columns:
            raise ValueError(
                f"block_shape: expected groups that divide intermediate_size {size}, got {self.block_shape}"
            )
        if shards > 1 and (size % columns or (rows and size % rows)):
            what = "groups" if rows == 0 else "blocks"
            raise ValueError(
                f"tp_size: expected shards of whole {what} of block_shape {self.block_shape}, got {size} of "
                f"intermediate_size {self.intermediate_size} for each of {shards} ranks"
            )

    def _check_placement(self) -> None:
        if self.expert_map is None:
            if self.parallel.ep_size > self.num_experts:
                raise ValueError(
                    f"ep_size: expected at most num_experts {self.num_experts} where no expert_map places them, "
                    f"got {self.parallel.ep_size}"
                )
            return
        if not isinstance(self.expert_map, tuple) or any(type(local) is not int for local in self.expert_map):
            raise TypeError(f"expert_map: expected a tuple of int, got {self.expert_map!r}")
        if len(self.expert_map) != self.num_experts:
            raise ValueError(
                f"expert_map: expected one entry for each of num_experts {self.num_experts}, got {len(self.expert_map)}"
            )
        owned = sorted(local for local in self.expert_map if local != -1)
        if owned != list(range(len(owned))):
            raise ValueError(
                f"expert_map: expected -1 or distinct local ids 0 to {len(owned) - 1}, got local ids {owned}"
            )

    @property
    def intermediate_size_per_partition(self) -> int:
        """I: the intermediate size of one rank."""
        return self.intermediate_size // self.parallel.tp_size

    @property
    def num_local_experts(self) -> int:
        """The experts whose weights this rank holds."""
        if self.expert_map is not None:
            return sum(local != -1 for local in self.expert_map)
        share, remainder = divmod(self.num_experts, self.parallel.ep_size)
        return share + (self.parallel.ep_rank < remainder)
