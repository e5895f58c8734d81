"""A kernel that is launched while the one before it still runs (programmatic dependent launch).

It waits before it touches memory. All that it may gain is the time between two kernels, and all that it can lose is the
wait: each kernel that takes `PDL` calls `wait_for_the_kernel_before` first of all, so that whatever ran before any
kernel of a stream has ended, and is seen, once that kernel reads or writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..platform import Platform


@triton.jit
def wait_for_the_kernel_before(PDL: tl.constexpr):
    """Wait for it to end, and let the kernel behind this one be launched, which waits in turn."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def early_start(tensor: torch.Tensor) -> dict[str, bool]:
    """Options of a launch on the tensor's device, of a kernel that waits: early where the device can do that."""
    if Platform.of(tensor.device).is_hopper:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
