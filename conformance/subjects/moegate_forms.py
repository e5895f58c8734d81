"""The Triton backend in the other forms of its kernels: a subject of its own, so that the general ones lose no case."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ...impl.experts.kernel_form import FormChoice, use_kernel_forms
from ..cases import ExpertsCase, LayerCase
from ..properties.path import Launches
from ..spec import ACTIVATIONS, BIASES
from ..subject import Capabilities
from .moegate import MoegateSubject, launches_of


def _plain_launches(case: LayerCase) -> dict[str, tuple[dict[str, int], ...]]:
    """Rows are streamed on naive blocks; sorted where tiles can be read."""
    table = launches_of(case) | {"naive": ({"gate_up_rows_kernel": 1, "down_rows_kernel": 1},)}
    if _tiles_can_be_read(case):
        table["aligned"] = _sorted(gated_gemm_kernel=1, sorted_gemm_kernel=1)
    return table


def _scaled_launches(case: LayerCase) -> dict[str, tuple[dict[str, int], ...]]:
    """Rows are sorted where tiles can be read, one block of scales is a tile's width, and the activation has a gate."""
    if case.stored is None:  # what is pinned of a property may be plain
        return _plain_launches(case)
    table = launches_of(case)
    rows, columns = case.stored.block_shape or (0, 0)
    fits = rows == columns and rows in (32, 64, 128) and case.activation.is_gated
    if fits and _tiles_can_be_read(case):
        table["aligned"] = _sorted(quantize_rows_kernel=1, scaled_gated_gemm_kernel=1, scaled_sorted_gemm_kernel=1)
    return table


def _sorted(**gemms: int) -> tuple[dict[str, int], ...]:
    layer = {"align_place_kernel": 1, **gemms, "combine_kernel": 1}
    return layer, {"align_count_kernel": 1, **layer}


def _tiles_can_be_read(case: LayerCase) -> bool:
    """Rows start on 16 bytes and hold groups of 8 columns, on a device that copies tiles."""
    weights = (case.w13, case.w2)
    starts = [w.data_ptr() for w in weights]
    starts += [w.element_size() * stride for w in weights for stride in w.stride()[:2]]
    if case.w13.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(case.w13.device) < (9, 0)):
        return False
    return all(start % 16 == 0 for start in starts) and all(w.shape[2] % 8 == 0 for w in weights)


class MoegateFormsSubject(MoegateSubject):
    """`fused_experts` under `use_kernel_forms("everywhere")`: streamed or sorted rows wherever their kernels fit."""

    name = "moegate:kernel_forms"
    variants = ("triton",)
    capabilities = Capabilities(
        dtypes=("bfloat16", "float16"),
        id_dtypes=("int32", "int64"),
        activations=tuple(ACTIVATIONS),
        biases=BIASES,
    )
    launches: ClassVar[dict[str, Launches]] = {"triton": _plain_launches}

    def facets(self, variant: str) -> tuple[str, ...]:
        """The experts and their path: everything else runs no other kernels than the subject `moegate` does."""
        del variant
        return ("experts", "trace", "launches")

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """As `MoegateSubject.experts`, in the other forms."""
        with use_kernel_forms(FormChoice.EVERYWHERE):
            return super().experts(case, variant)


class MoegateScaledFormsSubject(MoegateFormsSubject):
    """The same of fp8 with scales of blocks, on sizes whose rows start on 16 bytes, as tiles want them."""

    name = "moegate:scaled_forms"
    capabilities = replace(
        MoegateFormsSubject.capabilities, schemes=("fp8_block",), hidden_multiple=16, intermediate_multiple=16
    )
    launches: ClassVar[dict[str, Launches]] = {"triton": _scaled_launches}
