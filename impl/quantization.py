"""How a layer's experts are stored in few bits, and how its activations are quantised before each GEMM.

A weight is w ~ q * scale (int4: (q - zero) * scale), with one scale for each expert `[E]`, output channel `[E, N]`,
block, or group along K. The formats, exactly:

* blocks (bn, bk): `w13_scale [E, 2 * ceil(I / bn), ceil(H / bk)]`, whose grid starts anew at the first up row, and
  `w2_scale [E, ceil(H / bn), ceil(I / bk)]`;
* groups (0, g): `[E, N, K / g]`;
* int4: `uint8 [E, N, K / 2]`, the even k in the low nibble; `zero_point uint8 [E, N / 2, K / g]`, the even n in the low
  nibble, or None, which means 8;
* dynamic scales of activations: amax / 448 (int8: amax / 127), 1 where a row or group is all zero; clamped before the
  cast, rounded to nearest even, int8 in [-127, 127].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch

from .checks import expect_bool
from .config import QuantScheme, expect_block_shape

# The largest magnitude of each storage type of an activation; int8's range is symmetric.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


class ActivationScale(StrEnum):
    """What shares one scale of an activation."""

    NONE = "none"  # activations stay as they are
    STATIC = "static"  # the whole tensor, by a scale that is given
    TENSOR = "tensor"  # the whole tensor, by its own largest magnitude
    TOKEN = "token"  # a row
    GROUP = "group"  # a row's columns of one block of the weights


class WeightScale(StrEnum):
    """What shares one scale of a weight."""

    TENSOR = "tensor"  # an expert
    CHANNEL = "channel"  # a row of an expert's weight
    BLOCK = "block"  # a block of rows and columns
    GROUP = "group"  # a row's columns of one group


_SCHEMES = tuple(scheme for scheme in QuantScheme if scheme is not QuantScheme.NONE)
_LAYOUTS = {1: "one an expert", 2: "one a channel", 3: "one a block or group"}


@dataclass(frozen=True, eq=False)
class ExpertsQuantization:
    """The scales of one layer's experts. Scales are contiguous, on the weights' device.

    Attributes:
        scheme: fp8_w8a8, int8_w8a8, int8_w8a16 or int4_w4a16.
        w13_scale, w2_scale: float32 (the weight-only schemes also take the activations' dtype).
        w13_zero_point, w2_zero_point: of int4.
        block_shape: (bn, bk) of blocks, (0, g) of groups along K, None otherwise.
        a13_scale, a2_scale: float32 of one element: the static scales of both GEMMs' activations.
        per_act_token_quant: dynamic scales of activations are one a token, and not one a tensor; int8_w8a8 has no
            other.

    Raises:
        TypeError, ValueError: fields that contradict each other, by name; their sizes, dtypes and devices are checked
            where the weights are known, in a call.
    """

    scheme: QuantScheme
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    w13_zero_point: torch.Tensor | None = None
    w2_zero_point: torch.Tensor | None = None
    block_shape: tuple[int, int] | None = None
    a13_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None
    per_act_token_quant: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in _SCHEMES:
            raise ValueError(f"scheme: expected one of {[str(s) for s in _SCHEMES]}, got {self.scheme!r}")
        object.__setattr__(self, "scheme", QuantScheme(self.scheme))
        object.__setattr__(self, "block_shape", expect_block_shape(self.scheme, self.block_shape))
        expect_bool("per_act_token_quant", self.per_act_token_quant)
        for name, tensor in (("w13_scale", self.w13_scale), ("w2_scale", self.w2_scale)):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        self._check_weights()
        self._check_activations()

    def _check_weights(self) -> None:
        if self.block_shape is not None:
            dims: tuple[int, ...] = (3,)
        elif self.scheme is QuantScheme.FP8_W8A8:
            dims = (1, 2)
        else:
            dims = (2,)
        for name, scale in (("w13_scale", self.w13_scale), ("w2_scale", self.w2_scale)):
            if scale.ndim not in dims:
                wanted = " or ".join(f"{n} dimensions ({_LAYOUTS[n]})" for n in dims)
                raise ValueError(f"{name}: expected {wanted} for scheme {self.scheme}, got {list(scale.shape)}")
            dims = (scale.ndim,)
        zeros = (self.w13_zero_point, self.w2_zero_point)
        if self.scheme is not QuantScheme.INT4_W4A16:
            for name, zero in (("w13_zero_point", zeros[0]), ("w2_zero_point", zeros[1])):
                if zero is not None:
                    raise ValueError(f"{name}: expected None for scheme {self.scheme}, got {type(zero).__name__}")
        elif (zeros[0] is None) != (zeros[1] is None):
            missing, given = ("w13", "w2") if zeros[0] is None else ("w2", "w13")
            raise ValueError(f"{missing}_zero_point: expected one as {given}_zero_point is there, got None")

    def _check_activations(self) -> None:
        weight_only = self.scheme in (QuantScheme.INT8_W8A16, QuantScheme.INT4_W4A16)
        if self.per_act_token_quant and (weight_only or self.block_shape is not None):
            why = f"scheme {self.scheme}" + ("" if weight_only else " with block_shape, whose scales are one a group")
            raise ValueError(f"per_act_token_quant: expected False for {why}, got True")
        if self.scheme is QuantScheme.INT8_W8A8 and not self.per_act_token_quant:
            raise ValueError(f"per_act_token_quant: expected True for scheme {self.scheme}, got False")
        if self.a13_scale is None and self.a2_scale is None:
            return
        for name, scale in (("a13_scale", self.a13_scale), ("a2_scale", self.a2_scale)):
            if self.scheme is not QuantScheme.FP8_W8A8:
                if scale is not None:
                    raise ValueError(f"{name}: expected None for scheme {self.scheme}, got {type(scale).__name__}")
            elif scale is None:
                raise ValueError(f"{name}: expected a static scale beside the other GEMM's, got None")
            elif not isinstance(scale, torch.Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(scale).__name__}")
            elif self.block_shape is not None:
                raise ValueError(f"{name}: expected None with block_shape {self.block_shape}, got a static scale")
            elif self.per_act_token_quant:
                raise ValueError(f"{name}: expected None with per_act_token_quant, got a static scale")

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Its tensors by name."""
        return {
            "w13_scale": self.w13_scale,
            "w2_scale": self.w2_scale,
            "w13_zero_point": self.w13_zero_point,
            "w2_zero_point": self.w2_zero_point,
            "a13_scale": self.a13_scale,
            "a2_scale": self.a2_scale,
        }

    @cached_property
    def activation_dtype(self) -> torch.dtype | None:
        """What activations are stored as before each GEMM; None where they stay as they are."""
        if self.activation_scale is ActivationScale.NONE:
            return None
        return torch.int8 if self.scheme is QuantScheme.INT8_W8A8 else torch.float8_e4m3fn

    @property
    def group(self) -> int:
        """Columns along K that share one scale; 0 where there are no blocks and no groups."""
        return 0 if self.block_shape is None else self.block_shape[1]

    @cached_property
    def weight_scale(self) -> WeightScale:
        """What shares one scale of a weight."""
        if self.block_shape is not None:
            return WeightScale.BLOCK if self.block_shape[0] else WeightScale.GROUP
        return WeightScale.TENSOR if self.w13_scale.ndim == 1 else WeightScale.CHANNEL

    @cached_property
    def activation_scale(self) -> ActivationScale:
        """What shares one scale of an activation."""
        if self.scheme in (QuantScheme.INT8_W8A16, QuantScheme.INT4_W4A16):
            return ActivationScale.NONE
        if self.a13_scale is not None:
            return ActivationScale.STATIC
        if self.block_shape is not None:
            return ActivationScale.GROUP
        return ActivationScale.TOKEN if self.per_act_token_quant else ActivationScale.TENSOR
