"""Whether the GPUs of a run are there and run at their speed, seen from beside it, through NVML where it answers."""

from __future__ import annotations

import importlib
import os
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons that say a GPU slows itself down: for the hardware's own reasons, for
# heat by software and by hardware, and by the power brake. A cap on power is how these GPUs always run under load.
_SLOW = {0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake"}
# Errors of NVML that say a GPU is no longer there, by the names of pynvml's classes; others say that nobody knows.
_GONE = ("NVMLError_GpuIsLost", "NVMLError_NoSuchDevice", "NVMLError_NotFound", "NVMLError_GpuNotFound")


class GpuWatch:
    """Looks at GPUs again and again, and remembers what it saw.

    Args:
        nvml: the module `pynvml`, initialised; None: nobody knows, and nothing is ever complained of.
        names: of the GPUs, as CUDA_VISIBLE_DEVICES has them (numbers or UUIDs).
    """

    def __init__(self, nvml: Any, names: list[str]) -> None:
        self._nvml = nvml
        self._handles: dict[str, Any] = {}
        self._seen: dict[str, None] = {}
        if nvml is None:
            return
        for name in names:
            try:
                by_number = name.strip().isdigit()
                find = nvml.nvmlDeviceGetHandleByIndex if by_number else nvml.nvmlDeviceGetHandleByUUID
                self._handles[name] = find(int(name) if by_number else name)
            except Exception:  # a slice of a GPU, an old driver: nobody knows
                continue

    @staticmethod
    def of_this_machine(names: list[str]) -> GpuWatch:
        """A watch of these GPUs, where NVML is installed and answers."""
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
        except Exception:  # no pynvml, no driver, one of another age: a look from beside never ends a run
            return GpuWatch(None, [])
        return GpuWatch(nvml, names)

    def look(self) -> None:
        """Look at each once; takes well under a millisecond."""
        for name, handle in self._handles.items():
            try:
                reasons = int(self._nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
            except Exception as error:
                if type(error).__name__ in _GONE:
                    self._seen[f"GPU {name} is no longer there ({error})"] = None
                continue
            for bit, words in _SLOW.items():
                if reasons & bit:
                    self._seen[f"GPU {name} slowed itself down: {words}"] = None

    def complaints(self) -> list[str]:
        """What was seen, each once; empty where all is well, or nobody knows."""
        return list(self._seen)


def visible_gpus(count: int) -> list[str]:
    """The GPUs that this process may use, by number or UUID: `count` where nothing is said of which."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(count)] if visible is None else visible.split(",")
    return [name.strip() for name in names if name.strip() not in ("", "-1")]
