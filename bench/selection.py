"""Which workloads a run times: from the words of a command line or of pytest's options, with defaults per device."""

from __future__ import annotations

import torch

from .formats import find_format
from .workloads import MODELS, SMALL_MODELS, Routing, Workload, find_model

GPU_TOKENS = (1, 8, 64, 512, 4096)
CPU_TOKENS = (1, 64)


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, else the first GPU, else the CPU.

    Raises:
        ValueError: a device that this process does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {name!r}")
    return device


def select_workloads(
    device: torch.device,
    *,
    models: str | None = None,
    tokens: str | None = None,
    routings: str = "uniform",
    dtype: str | None = None,
) -> list[Workload]:
    """The product of what was asked for, model by model.

    Args:
        device: decides the defaults: full layers, bf16 and a cold cache on a GPU; small layers, fp32 and a warm cache
            on a CPU.
        models: comma-separated names; None: all that can be stored so. One named here is kept even if it cannot, so
            that the reason is reported.
        tokens: comma-separated numbers of tokens.
        routings: comma-separated routings (`Routing.parse`).
        dtype: a key of `FORMATS`: "bf16", "fp8-block", "int4-g128", ...

    Raises:
        ValueError: an unknown name, or not a number.
    """
    on_gpu = device.type == "cuda"
    dtype = dtype or ("bf16" if on_gpu else "fp32")
    find_format(dtype)
    if models is None:
        known = MODELS if on_gpu else SMALL_MODELS
        chosen = [model for model in known.values() if Workload(model, 1, dtype=dtype).unsupported is None]
    else:
        chosen = [find_model(name) for name in split_words(models)]
    counts = (GPU_TOKENS if on_gpu else CPU_TOKENS) if tokens is None else parse_counts(tokens)
    workloads = [
        Workload(model, count, Routing.parse(routing), dtype, "cold" if on_gpu else "warm")
        for model in chosen
        for routing in split_words(routings)
        for count in counts
    ]
    return list(dict.fromkeys(workloads))


def split_words(text: str) -> list[str]:
    """Comma-separated names.

    Raises:
        ValueError: there is none.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError(f"expected at least one name, got {text!r}")
    return words


def parse_counts(text: str) -> list[int]:
    """Comma-separated numbers of tokens.

    Raises:
        ValueError: something else.
    """
    words = split_words(text)
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise ValueError(f"tokens: expected a number of at least 1, got {word!r}")
    return [int(word) for word in words]
