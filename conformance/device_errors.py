"""What an error says of the device: that a kernel broke it, that its memory is full, or that it is gone.

PyTorch and Triton report all three as errors of whichever call comes next. After an illegal access a process can use
its GPU no more, so every later case would fail with it; a full memory is a fault of one call; and of a GPU that fell
off the bus nothing can be judged at all.
"""

from __future__ import annotations

import re
from enum import Enum

import torch

# How messages of the CUDA and HIP runtimes begin, in PyTorch and in Triton.
_OF_A_DEVICE = re.compile(r"(CUDA|HIP|Triton) (driver )?error\b|cudaError|hipError", re.IGNORECASE)
# What the runtime says, without the words around it.
_BROKEN = (
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "misaligned address",
    "invalid address space",
    "invalid program counter",
    "invalid pc",
    "not supported on global/shared address space",
    "device-side assert",
    "hardware stack error",
    "unspecified launch failure",
    "launch timed out",
)
_GONE = (
    "no CUDA-capable device",
    "No CUDA GPUs are available",
    "busy or unavailable",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "GPU is lost",
    "fallen off the bus",
    "driver shutting down",
    "device not ready or lost",
    "no HIP GPUs are available",
)
# "Tried to allocate 20.00 GiB", "you tried to allocate 1024 bytes", "Unable to allocate 7.45 GiB for an array".
_ASKED = re.compile(r"(?:tried|unable) to allocate ([0-9.]+ ?[KMGTPE]?i?B(?:ytes)?)\b", re.IGNORECASE)


# By name: the other side of `--subject-python` may have a PyTorch that has not all of them.
_FULL_TYPES = tuple({getattr(torch, "OutOfMemoryError", MemoryError), MemoryError})
_DEVICE_TYPES = tuple({getattr(torch, "AcceleratorError", MemoryError)})


class Trouble(Enum):
    """What happened to the device."""

    BROKEN = "a kernel broke it: its process can use it no more"
    FULL = "its memory is full"
    GONE = "it is gone, or its hardware failed"


class DeviceGoneError(RuntimeError):
    """The device answers no more, through no fault of the subject: nothing can be judged on it."""


def trouble_of(error: BaseException) -> Trouble | None:
    """What an error says of the device; None where it says nothing of it."""
    text = str(error)
    if isinstance(error, DeviceGoneError):
        return Trouble.GONE
    if isinstance(error, _FULL_TYPES):
        return Trouble.FULL
    if not isinstance(error, RuntimeError):
        return None
    if "DefaultCPUAllocator: can't allocate memory" in text:
        return Trouble.FULL
    if not (isinstance(error, _DEVICE_TYPES) or _OF_A_DEVICE.search(text) or "GPUs are available" in text):
        return None
    folded = text.casefold()
    for trouble, signs in ((Trouble.GONE, _GONE), (Trouble.BROKEN, _BROKEN)):
        if any(sign.casefold() in folded for sign in signs):
            return trouble
    return Trouble.FULL if "out of memory" in folded else None


def asked_for(error: BaseException) -> str:
    """The size that an allocation asked for, as its error has it; `an unknown size` where it has none."""
    found = _ASKED.search(str(error))
    return found.group(1) if found else "an unknown size"


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its text; what follows is advice on environment variables."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def settle_device() -> None:
    """Wait for the device, where this process uses one: an illegal access shows at the call that waits.

    Raises:
        RuntimeError: a kernel broke the device, or it is gone.
    """
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
