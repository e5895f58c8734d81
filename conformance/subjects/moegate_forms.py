"""The Triton backend in the other forms of its kernels: a subject of its own, so that the general ones lose no case."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...impl.experts.kernel_form import FormChoice, use_kernel_forms
from ..cases import ExpertsCase, LayerCase
from ..properties.path import Launches
from ..spec import ACTIVATIONS, BIASES
from ..subject import Capabilities
from .moegate import MoegateSubject, launches_of


def _launches(case: LayerCase) -> dict[str, tuple[dict[str, int], ...]]:
    """Rows are streamed on naive blocks; sorted where tiles can be read: on 16 bytes, by a device that copies tiles."""
    weights = (case.w13, case.w2)
    starts = [w.data_ptr() for w in weights] + [2 * stride for w in weights for stride in w.stride()[:2]]
    fits = all(start % 16 == 0 for start in starts) and all(w.shape[2] % 8 == 0 for w in weights)
    if case.w13.is_cuda:
        fits &= torch.version.hip is None and torch.cuda.get_device_capability(case.w13.device) >= (9, 0)
    table = launches_of(case) | {"naive": ({"gate_up_rows_kernel": 1, "down_rows_kernel": 1},)}
    if fits:
        layer = {"align_place_kernel": 1, "gated_gemm_kernel": 1, "sorted_gemm_kernel": 1, "combine_kernel": 1}
        table["aligned"] = (layer, {"align_count_kernel": 1, **layer})
    return table


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
    launches: ClassVar[dict[str, Launches]] = {"triton": _launches}

    def facets(self, variant: str) -> tuple[str, ...]:
        """The experts and their path: everything else runs no other kernels than the subject `moegate` does."""
        del variant
        return ("experts", "trace", "launches")

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """As `MoegateSubject.experts`, in the other forms."""
        with use_kernel_forms(FormChoice.EVERYWHERE):
            return super().experts(case, variant)
