"""Which workloads a run times: from the words of a command line or of pytest's options, with defaults per device."""

from __future__ import annotations

import torch

from .formats import find_format
from .workloads import MODELS, SMALL_MODELS, LoraOptions, Routing, Workload, find_model

GPU_TOKENS = (1, 8, 64, 512, 4096)
CPU_TOKENS = (1, 64)
# Whose layer is timed with adapters too, where nobody names models: they take kernels of their own.
LORA_MODEL, SMALL_LORA_MODEL, LORA = "qwen3-30b-a3b", "qwen3-30b-a3b/16", LoraOptions(16, 8)
LORA_TOKENS = (1, 64)
MOST_TOKENS = 2**24


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
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!a:.80}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!a:.80}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {name!a:.80}")
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
        models: comma-separated names; None: all that can be stored so, and one with LoRA adapters. One named here is
            kept even if it cannot, so that the reason is reported.
        tokens: comma-separated numbers of tokens.
        routings: comma-separated routings (`Routing.parse`).
        dtype: a key of `FORMATS`: "bf16", "fp8-block", "int4-g128", ...

    Raises:
        ValueError: an unknown name, or not a number.
    """
    on_gpu = device.type == "cuda"
    dtype = ("bf16" if on_gpu else "fp32") if dtype is None else dtype
    find_format(dtype)
    if models is None:
        known = MODELS if on_gpu else SMALL_MODELS
        chosen = [model for model in known.values() if Workload(model, 1, dtype=dtype).unsupported is None]
    else:
        chosen = [find_model(name) for name in split_words(models, "models")]
    counts = (GPU_TOKENS if on_gpu else CPU_TOKENS) if tokens is None else parse_counts(tokens)
    cache_state = "cold" if on_gpu else "warm"
    each_routing = [Routing.parse(routing) for routing in split_words(routings, "routing")]
    workloads = []
    for model in chosen:
        workloads += [Workload(model, m, routing, dtype, cache_state) for routing in each_routing for m in counts]
        if models is None and model.name == (LORA_MODEL if on_gpu else SMALL_LORA_MODEL):
            adapted = LORA_TOKENS if tokens is None else counts
            workloads += [Workload(model, m, each_routing[0], dtype, cache_state, LORA) for m in adapted]
    return [w for w in dict.fromkeys(workloads) if models is not None or w.unsupported is None]


def split_words(text: str, option: str) -> list[str]:
    """Comma-separated names.

    Args:
        text: the names.
        option: what they were given to, for the message.

    Raises:
        ValueError: one of them, or all, is empty.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ValueError(f"{option}: expected names separated by commas, got {text!a:.80}")
    return words


def parse_counts(text: str) -> list[int]:
    """Comma-separated numbers of tokens.

    Raises:
        ValueError: something else.
    """
    words = split_words(text, "tokens")
    for word in words:
        if not (word.isascii() and word.isdecimal() and 1 <= int(word[:12]) <= MOST_TOKENS):
            raise ValueError(f"tokens: expected a number in [1, {MOST_TOKENS}], got {word!a:.80}")
    return [int(word) for word in words]
