"""The parameters of one layer's experts on one rank, as every backend takes them, and the check that makes them so."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import debugging, expect_tensor
from .config import ActivationFunction, QuantScheme
from .quantization import ActivationScale, ExpertsQuantization, WeightScale


@dataclass(frozen=True, eq=False)
class ExpertsWeights:
    """Made by `expect_experts_weights`, which checks them.

    Attributes:
        w13: `[E_local, 2I, H]` (I rows for an activation that is not gated), int4 `[E_local, 2I, H / 2]`.
        w2: `[E_local, H, I]`, int4 `[E_local, H, I / 2]`.
        w13_bias: `[E_local, 2I]` in the order of w13's rows, or None.
        w2_bias: `[E_local, H]` or None.
        quant: how w13 and w2 are stored; None where they are of the activations' dtype.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    quant: ExpertsQuantization | None = None

    @property
    def scheme(self) -> QuantScheme:
        """How they are quantised."""
        return QuantScheme.NONE if self.quant is None else self.quant.scheme

    @property
    def block_shape(self) -> tuple[int, int] | None:
        """Of their scales."""
        return None if self.quant is None else self.quant.block_shape

    @property
    def num_local_experts(self) -> int:
        """E_local."""
        return self.w2.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.w2.shape[1]

    @property
    def intermediate_size(self) -> int:
        """I of this rank."""
        return self.w2.shape[2] * (2 if self.scheme is QuantScheme.INT4_W4A16 else 1)

    @property
    def has_bias(self) -> bool:
        """Whether either GEMM adds a bias."""
        return self.w13_bias is not None or self.w2_bias is not None

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Everything that a call reads of them, by name."""
        tensors = {"w13": self.w13, "w2": self.w2, "w13_bias": self.w13_bias, "w2_bias": self.w2_bias}
        return tensors if self.quant is None else tensors | self.quant.tensors()


# How each scheme stores a weight. Unquantised ones have the activations' dtype.
STORAGE = {
    QuantScheme.FP8_W8A8: torch.float8_e4m3fn,
    QuantScheme.INT8_W8A8: torch.int8,
    QuantScheme.INT8_W8A16: torch.int8,
    QuantScheme.INT4_W4A16: torch.uint8,
}
_STORED = frozenset(STORAGE.values())
_FLOAT32 = (torch.float32,)


def expect_experts_weights(
    hidden_states: torch.Tensor,
    num_local_experts: int | str,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    quant: ExpertsQuantization | None,
    activation: ActivationFunction,
) -> ExpertsWeights:
    """Check the parameters of a call against its activations and against each other; nothing waits for the device.

    Args:
        hidden_states: [..., H], checked.
        num_local_experts: E_local, or a name where the weights say it.
        w13: as `fused_experts` documents it, like all that follow.
        w2: experts' second weights.
        w13_bias: or None.
        w2_bias: or None.
        quant: or None.
        activation: checked.

    Raises:
        TypeError, ValueError: by name.
    """
    dtype, hidden_size = hidden_states.dtype, hidden_states.shape[-1]
    packed = 1
    if quant is None:
        storage = dtype
        if getattr(w13, "dtype", dtype) in _STORED:
            raise _without_scales("w13", w13, dtype)
        if getattr(w2, "dtype", dtype) in _STORED:
            raise _without_scales("w2", w2, dtype)
    else:
        if not isinstance(quant, ExpertsQuantization):
            raise TypeError(f"quant: expected an ExpertsQuantization or None, got {type(quant).__name__}")
        if dtype is torch.float32:
            raise TypeError(
                f"hidden_states: expected dtype torch.bfloat16 or torch.float16 for scheme {quant.scheme}, got {dtype}"
            )
        storage = STORAGE[quant.scheme]
        if quant.scheme is QuantScheme.INT4_W4A16:
            packed = 2
            if hidden_size % 2:
                raise ValueError(f"hidden_states: expected an even H for scheme {quant.scheme}, got {hidden_size}")
    columns = "I" if packed == 1 else "I / 2"
    expect_tensor("w2", w2, shape=(num_local_experts, hidden_size, columns), dtypes=(storage,), like=hidden_states)
    num_experts, _, intermediate_size = w2.shape
    intermediate_size *= packed
    rows = activation.rows_a_column * intermediate_size
    expect_tensor("w13", w13, shape=(num_experts, rows, hidden_size // packed), dtypes=(storage,), like=hidden_states)
    if hidden_size < 1 or intermediate_size < 1:
        raise ValueError(f"w2: expected H and I of at least 1, got shape {list(w2.shape)}")
    if w13_bias is not None:
        _expect_bias("w13_bias", w13_bias, (num_experts, rows), hidden_states)
    if w2_bias is not None:
        _expect_bias("w2_bias", w2_bias, (num_experts, hidden_size), hidden_states)
    if quant is not None:
        _expect_scales(quant, hidden_states, num_experts, hidden_size, intermediate_size, activation)
    return ExpertsWeights(w13, w2, w13_bias, w2_bias, quant)


def _without_scales(name: str, weight: torch.Tensor, dtype: torch.dtype) -> TypeError:
    return TypeError(
        f"{name}: expected dtype {dtype}, or quant with the scales of {weight.dtype} weights, "
        f"got {weight.dtype} without quant"
    )


def _expect_bias(name: str, bias: torch.Tensor, shape: tuple[int, int], hidden_states: torch.Tensor) -> None:
    dtypes = (hidden_states.dtype, torch.float32)
    expect_tensor(name, bias, shape=shape, dtypes=dtypes, like=hidden_states)


def _expect_scales(
    quant: ExpertsQuantization,
    hidden_states: torch.Tensor,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    activation: ActivationFunction,
) -> None:
    """Check the scales of a call against the sizes of its weights; nothing waits for the device.

    Args:
        quant: consistent in itself.
        hidden_states: whose dtype the scales of weight-only schemes may have, and whose device all have.
        num_experts: E_local.
        hidden_size: H.
        intermediate_size: I.
        activation: says how many rows w13 has, and whether gate and up alternate.

    Raises:
        TypeError, ValueError: by name.
    """
    parts = activation.rows_a_column
    kind = quant.weight_scale
    dtypes = _FLOAT32 if quant.activation_scale is not ActivationScale.NONE else (torch.float32, hidden_states.dtype)
    gemms = (
        ("w13", quant.w13_scale, quant.w13_zero_point, parts, intermediate_size, hidden_size),
        ("w2", quant.w2_scale, quant.w2_zero_point, 1, hidden_size, intermediate_size),
    )
    if kind is WeightScale.BLOCK and activation.interleaved:
        raise ValueError(
            "interleaved: expected False with scales in blocks, whose grid starts anew at the first up row, got True"
        )
    rows, columns = quant.block_shape or (0, 1)
    if kind is WeightScale.GROUP and (hidden_size % columns or intermediate_size % columns):
        raise ValueError(
            f"quant.block_shape: expected groups that divide H {hidden_size} and I {intermediate_size}, got {columns}"
        )
    for name, scale, zero_point, parts, n, k in gemms:
        if kind is WeightScale.TENSOR:
            shape = (num_experts,)
        elif kind is WeightScale.CHANNEL:
            shape = (num_experts, parts * n)
        elif kind is WeightScale.BLOCK:
            shape = (num_experts, parts * (-(-n // rows)), -(-k // columns))
        else:
            shape = (num_experts, parts * n, k // columns)
        expect_tensor(f"quant.{name}_scale", scale, shape=shape, dtypes=dtypes, like=hidden_states, contiguous=True)
        if zero_point is not None:
            expect_tensor(
                f"quant.{name}_zero_point",
                zero_point,
                shape=(num_experts, parts * n // 2, k // columns),
                dtypes=(torch.uint8,),
                like=hidden_states,
                contiguous=True,
            )
    for name, scale in (("a13", quant.a13_scale), ("a2", quant.a2_scale)):
        if scale is not None:
            shape = () if scale.ndim == 0 else (1,)
            expect_tensor(f"quant.{name}_scale", scale, shape=shape, dtypes=_FLOAT32, like=hidden_states)


def debug_expect_scales(quant: ExpertsQuantization | None) -> None:
    """In debug mode, check that every scale is positive and finite.

    Raises:
        ValueError: one that is not, by name, with how many there are.
    """
    if quant is None or not debugging():
        return
    for name, scale in quant.tensors().items():
        if scale is None or name.endswith("zero_point") or not scale.numel():
            continue
        bad = int((~(scale.isfinite() & (scale > 0))).sum())
        if bad:
            raise ValueError(f"quant.{name}: expected positive and finite scales, got {bad} of {scale.numel()} others")
