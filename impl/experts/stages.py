"""What the Triton backends of both activation formats do around their two GEMMs."""

from __future__ import annotations

import torch

from .. import path
from ..config import ActivationFunction
from ..kernels.activation import activate, activate_and_quantize
from ..kernels.lora_rows import AdapterRows
from ..kernels.lora_shrink import Shrunk, lora_shrink
from ..kernels.quantize import Rows, quantize_rows
from ..kernels.tile import GemmOperands, gemm_operands
from ..lora.table import AdapterTable, StackedLowRank
from ..platform import Platform
from ..quantization import ActivationScale
from ..tuning.lookup import TunedConfigs
from ..weights import ExpertsWeights


def note_tiles(configs: TunedConfigs) -> None:
    """Record which tiles a layer takes, and where they come from; nothing is built where nobody listens."""
    if path.is_recording():
        path.note("config", configs.w13.as_dict() | {"source": configs.source})
        path.note("config_w2", configs.w2.as_dict() | {"source": configs.source})


class LayerWorkspace:
    """One allocation for what passes between the kernels.

    GEMM2's output takes over the memory of GEMM1's once the activation has read it. Parts start on 256 bytes.

    Args:
        like: a tensor of the storage dtype and device.
        num_rows: rows of every part.
        w13_rows: of an expert.
        intermediate_size: I.
        hidden_size: H where GEMM2's output lies here too, 0 where it goes elsewhere.
    """

    __slots__ = ("expert_output", "gate_up", "hidden")

    def __init__(
        self, like: torch.Tensor, num_rows: int, w13_rows: int, intermediate_size: int, hidden_size: int
    ) -> None:
        gate_up_size = num_rows * w13_rows
        first_size = (max(gate_up_size, num_rows * hidden_size) + 127) // 128 * 128
        memory = torch.empty(first_size + num_rows * intermediate_size, dtype=like.dtype, device=like.device)
        self.gate_up = memory[:gate_up_size].view(num_rows, w13_rows)
        self.hidden = memory[first_size:].view(num_rows, intermediate_size)
        self.expert_output = memory[: num_rows * hidden_size].view(num_rows, hidden_size)


def quantize_input(
    hidden_states: torch.Tensor,
    weights: ExpertsWeights,
    rows: Rows | None = None,
    *,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The first GEMM's operand and its scales: the hidden states, quantised where the scheme says so.

    Args:
        hidden_states: [M, H], or [E_local, max_tokens, H] with `rows`.
        weights: of the layer.
        rows: which rows hold something; None for all.
        scale: of hidden states that are quantised already.
    """
    if scale is not None:
        return hidden_states, scale
    quant = weights.quant
    dtype = None if quant is None else quant.activation_dtype
    if quant is None or dtype is None:
        return hidden_states, None
    return quantize_rows(hidden_states, dtype, quant.activation_scale, quant.group, quant.a13_scale, rows=rows)


def activate_hidden(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    weights: ExpertsWeights,
    function: ActivationFunction,
    rows: Rows,
    platform: Platform,
    *,
    keep_plain: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The second GEMM's operand and its scales.

    Args:
        hidden: [rows, I] of the storage dtype to write into, where it is not quantised in the same kernel.
        gate_up: [rows, 2I] or [rows, I].
        weights: of the layer.
        function: the activation.
        rows: which rows hold something.
        platform: where it runs.
        keep_plain: `hidden` holds the rows as they are before they are quantised, which LoRA reads.
    """
    quant = weights.quant
    dtype = None if quant is None else quant.activation_dtype
    if quant is None or dtype is None:
        activate(hidden, gate_up, function, rows, platform)
        return hidden, None
    scale = quant.activation_scale
    if scale is ActivationScale.TENSOR:
        # The tensor's largest magnitude is known only when all of it is there.
        activate(hidden, gate_up, function, rows, platform)
        return quantize_rows(hidden, dtype, scale, rows=rows)
    if keep_plain:
        values = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        group, static = quant.group, quant.a2_scale
        return values, activate_and_quantize(values, gate_up, function, scale, group, static, rows, hidden)
    # The quantised values lie where the plain ones would have lain.
    values = hidden.view(-1).view(dtype)[: hidden.numel()].view(hidden.shape)
    scales = activate_and_quantize(values, gate_up, function, scale, quant.group, quant.a2_scale, rows)
    return values, scales


def w13_operands(weights: ExpertsWeights, function: ActivationFunction, a_scale: torch.Tensor | None) -> GemmOperands:
    """The first GEMM's operands; the grid of block scales starts anew at the first up row."""
    parts = 2 if function.kind.is_gated and not function.interleaved else 1
    return gemm_operands(weights.w13, weights.w13_bias, weights.quant, is_w13=True, parts=parts, a_scale=a_scale)


def w2_operands(weights: ExpertsWeights, a_scale: torch.Tensor | None) -> GemmOperands:
    """The second GEMM's operands."""
    return gemm_operands(weights.w2, weights.w2_bias, weights.quant, is_w13=False, parts=1, a_scale=a_scale)


class LayerAdapters:
    """LoRA's first products of one call; each GEMM adds its own to the accumulator.

    Args:
        table: of the layer.
        rows: of the call.
        platform: where it runs.
        allow_tf32: float32 operands may be rounded to TF32.
    """

    __slots__ = ("_allow_tf32", "_platform", "_rows", "_table")

    def __init__(self, table: AdapterTable, rows: AdapterRows, platform: Platform, *, allow_tf32: bool) -> None:
        self._table, self._rows, self._platform, self._allow_tf32 = table, rows, platform, allow_tf32

    def w13(self, hidden_states: torch.Tensor) -> Shrunk:
        """Of the first GEMM: its input as it came, before it is quantised. To be asked for first."""
        return self._shrink(hidden_states, self._table.w13, make_lists=True)

    def w2(self, hidden: torch.Tensor) -> Shrunk:
        """Of the second GEMM: the activation's rows, before they are quantised."""
        return self._shrink(hidden, self._table.w2, make_lists=False)

    def _shrink(self, x: torch.Tensor, low_rank: StackedLowRank, *, make_lists: bool) -> Shrunk:
        return lora_shrink(x, low_rank, self._rows, self._platform, make_lists=make_lists, allow_tf32=self._allow_tf32)
