"""The backends by name, and the experts class behind each name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from enum import StrEnum
from functools import cache

from ..checks import expect_one_of
from ..experts.base import Experts

AUTO = "auto"


class UnquantizedMoeBackend(StrEnum):
    """Who computes the routed experts; the quantised tables choose among the same names."""

    FLASHINFER_TRTLLM = "flashinfer_trtllm"
    FLASHINFER_CUTLASS = "flashinfer_cutlass"
    AITER = "aiter"
    TRITON = "triton"
    BATCHED_TRITON = "batched_triton"
    CPU = "cpu"
    XPU = "xpu"
    TPU = "tpu"
    OUT_OF_TREE = "out_of_tree"


# TPU and out-of-tree platforms bring their own experts: their entries name nobody here.
EXPERTS: Mapping[UnquantizedMoeBackend, tuple[str, str]] = {
    UnquantizedMoeBackend.FLASHINFER_TRTLLM: ("flashinfer_trtllm", "FlashInferTrtllmExperts"),
    UnquantizedMoeBackend.FLASHINFER_CUTLASS: ("flashinfer_cutlass", "FlashInferCutlassExperts"),
    UnquantizedMoeBackend.AITER: ("aiter", "AiterExperts"),
    UnquantizedMoeBackend.TRITON: ("triton", "TritonExperts"),
    UnquantizedMoeBackend.BATCHED_TRITON: ("batched_triton", "BatchedTritonExperts"),
    UnquantizedMoeBackend.CPU: ("cpu", "CpuExperts"),
    UnquantizedMoeBackend.XPU: ("xpu", "XpuExperts"),
}


def experts_class(backend: UnquantizedMoeBackend) -> type[Experts]:
    """The experts class of a backend; its module is imported when first asked for.

    Raises:
        ValueError: an unknown backend, or one without experts here (TPU, out-of-tree).
    """
    return _experts_class(expect_one_of("backend", backend, EXPERTS))


@cache
def _experts_class(backend: UnquantizedMoeBackend) -> type[Experts]:
    module, name = EXPERTS[backend]
    return getattr(importlib.import_module(f"..experts.{module}", __package__), name)
