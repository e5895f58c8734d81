"""How a timed layer is stored: the dtypes and schemes by the short names that workloads bear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..impl.config import QuantScheme
from ..impl.quantization import WeightScale
from ..impl.weights import STORAGE

_WEIGHT_BITS = {
    QuantScheme.FP8_W8A8: 8,
    QuantScheme.INT8_W8A8: 8,
    QuantScheme.INT8_W8A16: 8,
    QuantScheme.INT4_W4A16: 4,
}


@dataclass(frozen=True)
class Format:
    """One way to store experts and activations.

    Attributes:
        name: in a workload's id and on the command line.
        activations: of hidden states and output, and of weights that are not quantised.
        peak: whose matrix products bound it: a key of `Ceilings.peak`.
        scheme: how it is quantised.
        weight_scale: what shares a scale of a weight; None where nothing is quantised.
        block_shape: (bn, bk) of blocks, (0, g) of groups along K, None otherwise.
        zero_points: of int4.
        per_act_token_quant: scales of activations are one a token.
    """

    name: str
    activations: torch.dtype
    peak: str
    scheme: QuantScheme = QuantScheme.NONE
    weight_scale: WeightScale | None = None
    block_shape: tuple[int, int] | None = None
    zero_points: bool = False
    per_act_token_quant: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored in few bits."""
        return self.scheme is not QuantScheme.NONE

    @property
    def is_weight_only(self) -> bool:
        """Whether activations stay as they are though weights are quantised."""
        return self.scheme in (QuantScheme.INT8_W8A16, QuantScheme.INT4_W4A16)

    @property
    def weight_bits(self) -> int:
        """Bits of one stored weight."""
        return _WEIGHT_BITS.get(self.scheme, 8 * self.activations.itemsize)

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of both operands of its matrix products: weights alone in few bits are unpacked to the activations' dtype."""
        return self.activations if self.is_weight_only else STORAGE.get(self.scheme, self.activations)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the weights' scales: as checkpoints have them, those of weight-only schemes in the activations' dtype."""
        return self.activations if self.is_weight_only else torch.float32

    def weight_bytes(self, rows: int, columns: int, parts: int = 1) -> int:
        """Bytes of one expert's weight `[rows, columns]` with its scales and zero points.

        Args:
            rows: of all parts.
            columns: K.
            parts: equal parts of the rows at which the grid of blocks starts anew.
        """
        stored = rows * columns * self.weight_bits // 8
        bn, bk = self.block_shape or (0, 0)
        match self.weight_scale:
            case None:
                return stored
            case WeightScale.TENSOR:
                scales = 1
            case WeightScale.CHANNEL:
                scales = rows
            case WeightScale.GROUP:
                scales = rows * (columns // bk)
            case WeightScale.BLOCK:
                scales = parts * -(-rows // parts // bn) * -(-columns // bk)
        zeros = scales // 2 if self.zero_points else 0
        return stored + scales * self.scale_dtype.itemsize + zeros

    def unfit(self, hidden_size: int, intermediate_size: int) -> str | None:
        """Why experts of these sizes cannot be stored so, in words; None where they can."""
        if self.weight_scale is WeightScale.GROUP and self.block_shape is not None:
            group = self.block_shape[1]
            if hidden_size % group or intermediate_size % group:
                return f"{self.name} needs H and I that {group} divides, got {hidden_size} and {intermediate_size}"
        return None


def _formats() -> Iterator[Format]:
    yield Format("bf16", torch.bfloat16, "bf16")
    yield Format("fp16", torch.float16, "fp16")
    yield Format("fp32", torch.float32, "fp32")
    bf16, fp8, int8, int4 = (
        torch.bfloat16,
        QuantScheme.FP8_W8A8,
        QuantScheme.INT8_W8A16,
        QuantScheme.INT4_W4A16,
    )
    yield Format("fp8-tensor", bf16, "fp8", fp8, WeightScale.TENSOR)
    yield Format("fp8-token", bf16, "fp8", fp8, WeightScale.CHANNEL, per_act_token_quant=True)
    yield Format("fp8-block", bf16, "fp8", fp8, WeightScale.BLOCK, (128, 128))
    yield Format("int8-w8a8", bf16, "int8", QuantScheme.INT8_W8A8, WeightScale.CHANNEL, per_act_token_quant=True)
    yield Format("int8-w8a16", bf16, "bf16", int8, WeightScale.CHANNEL)
    yield Format("int8-g128", bf16, "bf16", int8, WeightScale.GROUP, (0, 128))
    for group in (32, 64, 128):
        yield Format(f"int4-g{group}", bf16, "bf16", int4, WeightScale.GROUP, (0, group))
    yield Format("int4-g128-zp", bf16, "bf16", int4, WeightScale.GROUP, (0, 128), zero_points=True)


FORMATS = {each.name: each for each in _formats()}


def find_format(name: str) -> Format:
    """The format of this name.

    Raises:
        ValueError: an unknown name, with those that are.
    """
    if name not in FORMATS:
        raise ValueError(f"dtype: expected one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]
