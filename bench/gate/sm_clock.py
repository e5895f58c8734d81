"""The GPU's SM clock while something runs, and what else uses the device, through NVML where it answers."""

from __future__ import annotations

import importlib
import os
import time
from contextlib import suppress
from typing import Any

import torch

# Fields of nvmlDeviceGetCurrentClocksEventReasons that say a GPU slows itself down: hardware slowdown, its thermal and
# power-brake parts, and the software's thermal one.
_SLOWDOWN = 0x8 | 0x20 | 0x40 | 0x80
_BUSY_PERCENT = 10
_BUSY_READINGS = 6
_BUSY_INTERVAL = 0.1


def _handle(device: torch.device) -> tuple[Any, Any] | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # NVML absent, too old, or without rights: the clock is not known then
        return None


class SmClock:
    """Reads one GPU's SM clock in tens of microseconds.

    Attributes:
        most: its highest clock in MHz; None where it cannot be read.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml = _handle(device)
        self.most: int | None = None
        if self._nvml is not None:
            nvml, handle = self._nvml
            with suppress(Exception):
                self.most = int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))

    def read(self) -> int | None:
        """MHz now; None where it cannot be read."""
        if self._nvml is None:
            return None
        nvml, handle = self._nvml
        try:
            return int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        except Exception:
            return None

    def slows_itself_down(self) -> bool:
        """Whether the driver says that heat or power holds the clock back."""
        if self._nvml is None:
            return False
        nvml, handle = self._nvml
        try:
            return bool(int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) & _SLOWDOWN)
        except Exception:
            return False


def other_use(device: torch.device) -> str:
    """What uses the device before we do, in words; empty where nothing does or nobody says.

    On a GPU its utilisation over half a second, with the processes that the driver names; on a CPU the load of the
    last minute against the cores.
    """
    if device.type != "cuda":
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        return f"a load of {load:.1f} on {cores} cores" if load > 0.5 * cores else ""
    held = _handle(device)
    if held is None:
        return ""
    nvml, handle = held
    readings, users = [], []
    with suppress(Exception):
        for _ in range(_BUSY_READINGS):
            readings.append(int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
            time.sleep(_BUSY_INTERVAL)
        users = [str(process.pid) for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    if not readings or sorted(readings)[len(readings) // 2] < _BUSY_PERCENT:
        return ""
    who = ", by process " + ", ".join(users) if users else ""
    return f"{sorted(readings)[len(readings) // 2]} % utilised{who}"
