"""What a measurement ran on: the device, its driver and clocks, and the software beneath the kernels."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache

import torch

from .floor import device_name

_NVIDIA_SMI_SECONDS = 10


@dataclass(frozen=True)
class Clocks:
    """One reading of a GPU's clocks and state; None where the driver does not say.

    Attributes:
        sm_mhz: streaming multiprocessor clock.
        memory_mhz: memory clock.
        temperature_c: degrees Celsius.
        power_w: watts.
    """

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None


@dataclass(frozen=True)
class Machine:
    """A device and its software.

    Attributes:
        device: the device's name, "cpu" for a CPU.
        driver: the GPU driver's version, "" without one.
        cuda: the CUDA version that torch was built for, "" without one.
        l2_bytes: the GPU's L2 size; 0 where not known.
        torch, triton, python: versions.
        host: the CPU's architecture and core count.
    """

    device: str
    driver: str
    cuda: str
    l2_bytes: int
    torch: str
    triton: str
    python: str
    host: str


@cache
def describe_machine(device: torch.device) -> Machine:
    """The machine as seen from `device`."""
    return Machine(
        device=device_name(device),
        driver=_driver_version() if device.type == "cuda" else "",
        cuda=str(torch.version.cuda or torch.version.hip or "") if device.type == "cuda" else "",
        l2_bytes=l2_bytes(device),
        torch=torch.__version__,
        triton=_version("triton"),
        python=platform.python_version(),
        host=f"{platform.machine()}, {torch.get_num_threads()} threads",
    )


def l2_bytes(device: torch.device) -> int:
    """The size of a GPU's L2 in bytes; 0 on a CPU and where the driver does not say."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def read_clocks(device: torch.device) -> Clocks:
    """The GPU's clocks now, through NVML or else nvidia-smi; nothing known on a CPU and where neither answers.

    It takes milliseconds (NVML) to a tenth of a second (nvidia-smi): never read them between two samples.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return Clocks()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        return _nvml_clocks(uuid)
    except Exception:  # NVML absent, too old, or without rights: the slower way may still answer
        fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
        values = [_number(text) for text in (_nvidia_smi(fields, uuid) or ["", "", "", ""])]
        return Clocks(*(None if value is None else int(value) for value in values[:3]), values[3])


def _nvml_clocks(uuid: str) -> Clocks:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        return Clocks(
            sm_mhz=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            memory_mhz=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            temperature_c=int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        )
    finally:
        nvml.nvmlShutdown()


def _nvidia_smi(fields: str, uuid: str | None = None) -> list[str] | None:
    """The first GPU's (or that GPU's) values; None where nvidia-smi is absent or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits", *(["-i", uuid] if uuid else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return values if len(values) == len(fields.split(",")) else None


def _driver_version() -> str:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        try:
            version = nvml.nvmlSystemGetDriverVersion()
        finally:
            nvml.nvmlShutdown()
        return version.decode() if isinstance(version, bytes) else str(version)
    except Exception:  # as in read_clocks
        return (_nvidia_smi("driver_version") or [""])[0]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
