"""In which form of its kernels a Triton layer runs: a pure function, with its reason.

The general kernels take every layer on every platform. Two other forms fit some: *streamed* rows for a few tokens
(`kernels.stream_rows`), *sorted* rows for many (`kernels.gated_gemm`, `kernels.sorted_gemm`), which are faster there.
`docs/performance.md` has what was measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch

from ..checks import expect_one_of
from ..config import QuantScheme
from ..kernels.align import max_num_blocks
from ..kernels.sizes import cdiv
from ..platform import Platform, Vendor

FORMS_VARIABLE = "MOEGATE_KERNEL_FORMS"

# The streamed kernels keep a row of each of a token's experts in registers.
MOST_STREAMED_CHOICES = 32
# The copy engine takes rows that start on 16 bytes; the activation's epilogue takes gate and up rows in groups of 8.
_COPY_BYTES = 16
_COLUMNS = 8


@dataclass(frozen=True)
class _Gain:
    """From where on sorted rows gained on an H200: rows an expert, waves of the second GEMM's tiles, columns of K."""

    rows: int
    waves: int
    columns: int
    tile: tuple[int, int]


_PLAIN_GAIN = _Gain(rows=128, waves=12, columns=512, tile=(128, 256))
_SCALED_GAIN = _Gain(rows=32, waves=12, columns=256, tile=(64, 128))
# A step of the matrix instruction takes 32 bytes of a row, and a tile one block of scales.
_SCALE_BLOCKS = (32, 64, 128)
_HOPPER_SMS = 132  # of a Hopper that is only spoken of


class KernelForm(StrEnum):
    """Which kernels a layer launches."""

    GENERAL = "general"  # align, GEMM, activation, GEMM, sum
    STREAMED = "streamed"  # two matrix-vector kernels, for naive blocks
    SORTED = "sorted"  # align, GEMM with the activation (fp8: quantised), GEMM on rows in the alignment's order, sum


class FormChoice(StrEnum):
    """Where the other forms are taken."""

    GENERAL = "general"  # nowhere
    MEASURED = "measured"  # where they were measured to be faster: on Hopper
    EVERYWHERE = "everywhere"  # wherever they can run: how they are tested


@dataclass(frozen=True)
class FormQuestion:
    """What the form depends on.

    Attributes:
        num_pairs: M * top_k.
        top_k: experts a token.
        num_experts: E, over which pairs are spread.
        num_local_experts: of this rank.
        hidden_size: H.
        intermediate_size: I.
        is_gated: of the activation.
        dtype: of activations and weights.
        scheme: the weights' quantisation.
        scale_block: b where weights and activations are fp8 with a scale for b x b and for b; 0 elsewhere.
        is_naive: pairs are blocks of their own (`align.uses_naive_block_assignment`).
        has_adapters: some token may have LoRA adapters.
        on_copy_grid: weights and rows lie as the copy engine wants them (`lies_on_copy_grid`).
        platform: where it runs.
    """

    num_pairs: int
    top_k: int
    num_experts: int
    num_local_experts: int
    hidden_size: int
    intermediate_size: int
    is_gated: bool
    dtype: torch.dtype
    scheme: QuantScheme
    is_naive: bool
    has_adapters: bool
    on_copy_grid: bool
    platform: Platform
    scale_block: int = 0


@dataclass(frozen=True)
class FormDecision:
    """The form, and why it and no other.

    Attributes:
        form: of the kernels.
        why: in words for the user.
    """

    form: KernelForm
    why: str

    def as_dict(self) -> dict[str, str]:
        """Plain data, as the path record holds it."""
        return {"form": str(self.form), "why": self.why}


GENERAL = FormDecision(KernelForm.GENERAL, f"{FORMS_VARIABLE} asks for no other")


def lies_on_copy_grid(*weights: torch.Tensor) -> bool:
    """Whether every row of weights `[E, rows, columns]` starts on 16 bytes and holds whole groups of 8 columns."""
    for w in weights:
        strides = (w.stride(0) * w.element_size(), w.stride(1) * w.element_size())
        if w.data_ptr() % _COPY_BYTES or any(stride % _COPY_BYTES for stride in strides) or w.shape[2] % _COLUMNS:
            return False
    return True


@lru_cache(maxsize=4096)
def kernel_form(question: FormQuestion, choice: FormChoice) -> FormDecision:
    """The form in which a layer runs; a device with no other form, and a layer that none fits, take the general one."""
    if choice is FormChoice.GENERAL:
        return GENERAL
    form = KernelForm.STREAMED if question.is_naive else KernelForm.SORTED
    obstacle = _unfit(question, form)
    if obstacle is None and choice is FormChoice.MEASURED:
        obstacle = _unmeasured(question, form)
    if obstacle is not None:
        return FormDecision(KernelForm.GENERAL, f"not {form}: {obstacle}")
    return FormDecision(form, "pairs are blocks of their own" if question.is_naive else "pairs are aligned")


def _unfit(question: FormQuestion, form: KernelForm) -> str | None:
    """Why the kernels of `form` cannot take the layer; None where they can."""
    if question.scheme is not QuantScheme.NONE and (form is KernelForm.STREAMED or not question.scale_block):
        return f"weights are {question.scheme}"
    if question.scale_block:
        if question.scale_block not in _SCALE_BLOCKS:
            return f"blocks of scales are {question.scale_block} wide, not {' or '.join(map(str, _SCALE_BLOCKS))}"
        if not question.is_gated:
            return "fp8 needs an activation with a gate"
    if question.dtype.itemsize != 2:
        return f"dtype is {str(question.dtype).removeprefix('torch.')}"
    if question.has_adapters:
        return "tokens may have adapters"
    if form is KernelForm.STREAMED:
        most = MOST_STREAMED_CHOICES
        return f"top_k is {question.top_k}, over {most}" if question.top_k > most else None
    platform = question.platform
    has_copy_engine = platform.vendor is Vendor.NVIDIA and (platform.capability or (0, 0)) >= (9, 0)
    if not has_copy_engine and not platform.interpreted:
        return f"{platform} has no copy engine for tiles (TMA)"
    return (
        None if question.on_copy_grid else "rows of weights do not start on 16 bytes, or have no multiple of 8 columns"
    )


def _unmeasured(question: FormQuestion, form: KernelForm) -> str | None:
    """Why the layer is not one of those that `form` was measured to make faster; None where it is."""
    if not question.platform.is_hopper:
        return f"never measured on {question.platform}"
    if form is KernelForm.STREAMED:
        return "in whole layers they took longer than the general kernels"
    if not question.is_gated:
        return "an activation without a gate took longer"
    gain = _SCALED_GAIN if question.scale_block else _PLAIN_GAIN
    if question.scale_block not in (0, 128):
        return f"blocks of scales are {question.scale_block} wide: measured with 128 alone"
    if question.intermediate_size < gain.columns:
        return f"I is {question.intermediate_size}, under {gain.columns}"
    pairs = question.num_pairs * question.num_local_experts // question.num_experts
    rows = pairs // question.num_local_experts
    if rows < gain.rows:
        return f"{rows} rows an expert, under {gain.rows}"
    blocks = max_num_blocks(pairs, question.num_local_experts, gain.tile[0])
    waves = blocks * cdiv(question.hidden_size, gain.tile[1]) / (question.platform.num_sms or _HOPPER_SMS)
    return f"{waves:.1f} waves of tiles, under {gain.waves}" if waves < gain.waves else None


def form_choice(environment: Mapping[str, str]) -> FormChoice:
    """What the environment's variable asks for; what was measured to be faster where it is not set.

    Raises:
        ValueError: it names no choice.
    """
    text = environment.get(FORMS_VARIABLE, "").strip().lower() or str(FormChoice.MEASURED)
    if text not in list(FormChoice):
        raise ValueError(f"{FORMS_VARIABLE}: expected one of {[str(c) for c in FormChoice]}, got {text!a:.80}")
    return FormChoice(text)


_is_asked_for = form_choice(os.environ)
_in_force: ContextVar[FormChoice] = ContextVar("moegate_kernel_forms", default=_is_asked_for)


@contextmanager
def use_kernel_forms(choice: FormChoice | str) -> Iterator[None]:
    """Run the layers inside this block in the forms of `choice`, whatever the environment says.

    Raises:
        TypeError, ValueError: no choice.
    """
    expect_one_of("choice", choice, FormChoice)
    token = _in_force.set(FormChoice(choice))
    try:
        yield
    finally:
        _in_force.reset(token)


def choice_in_force() -> FormChoice:
    """The choice of the innermost `use_kernel_forms` block, or the environment's at the process's start."""
    return _in_force.get()
