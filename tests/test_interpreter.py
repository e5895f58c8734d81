"""Each repair of Triton's interpreter is needed, and makes it agree with compiled kernels.

A probe runs a small kernel and compares what comes out with what the GPU computes. Triton reads its mode when it is
imported, so the probes run in child processes: this file, started as a program. The child imports Triton once and
forks for every repair, to run that repair's probes in an interpreter that lacks it.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction

import numpy
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

from moegate.conformance import interpreter
from moegate.conformance.bounds import OutOfBoundsError

DEVICE = "cpu"
RIGHT = "right"
PROBES: dict[str, "Probe"] = {}


class Probe:
    """A kernel's result against the truth, and the repair (if any) without which it is wrong."""

    def __init__(self, run: Callable[[], None], repair: str | None, compiles: bool):
        self.run, self.repair, self.compiles = run, repair, compiles

    def verdict(self) -> str:
        try:
            self.run()
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:500]
        return RIGHT


def probe(repair: str | None, *, compiles: bool = True) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a probe; `compiles` says that it makes sense on a GPU."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        PROBES[run.__name__] = Probe(run, repair, compiles)
        return run

    return register


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal everywhere, where NaN equals NaN and zeros are told apart by nobody."""
    assert actual.dtype == expected.dtype, f"{actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{list(actual.shape)} instead of {list(expected.shape)}"
    a, e = actual.cpu().double(), expected.cpu().double()
    wrong = ~((a == e) | (a.isnan() & e.isnan()))
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {a.numel()} wrong: {a[wrong][:3].tolist()} for {e[wrong][:3].tolist()}"
    )


def refuses(run: Callable[[], object], *errors: type[Exception]) -> None:
    try:
        run()
    except errors:
        return
    raise AssertionError(f"ran, where {errors} was due")


# --- Kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def map_kernel(x, y, out, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n)
    b = tl.load(y + i, mask=i < n)
    tl.store(out + i, FUNCTION(a, b).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def cast_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def rows_kernel(x, out, FUNCTION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    r = tl.arange(0, ROWS)
    block = tl.load(x + r[:, None] * COLS + tl.arange(0, COLS)[None, :])
    result = FUNCTION(block)
    tl.store(out + r[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], result.to(out.dtype.element_ty))


def mapped(function, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`function(x, y)`, a jitted function of two blocks, over whole tensors."""
    n, block = x.numel(), 1024
    out = torch.empty(n, dtype=dtype or x.dtype, device=DEVICE)
    map_kernel[(triton.cdiv(n, block),)](x.to(DEVICE), y.to(DEVICE), out, n, FUNCTION=function, BLOCK=block)
    return out.cpu()


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    n, block = x.numel(), 8192
    out = torch.empty(n, dtype=dtype, device=DEVICE)
    cast_kernel[(triton.cdiv(n, block),)](x.to(DEVICE), out, n, BLOCK=block)
    return out.cpu()


def by_row(function, x: torch.Tensor, width: int = 1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`function(block)`, a jitted function that keeps the rows of a block and gives each `width` columns."""
    rows, cols = x.shape
    out = torch.empty(rows, width, dtype=dtype or x.dtype, device=DEVICE)
    rows_kernel[(1,)](x.to(DEVICE), out, FUNCTION=function, ROWS=rows, COLS=cols, WIDTH=width)
    return out.cpu()


# --- Inputs ---------------------------------------------------------------------------------------------------------


def every(dtype: torch.dtype) -> torch.Tensor:
    """All bit patterns of a format of 8 or 16 bits."""
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    return torch.arange(65536).to(torch.int32).to(torch.int16).view(dtype)


def many_floats() -> torch.Tensor:
    """Random float32 bit patterns, and every bfloat16 with what lies just beside it and at the ties above it."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(-(2**31), 2**31, (65536,), generator=generator)
    upper = torch.arange(-32768, 32768) << 16
    beside = [upper + lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    ties = torch.cat([every(dtype).float() for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)])
    halfway = (ties[:-1] + ties[1:]) / 2
    around = torch.cat([halfway, halfway.nextafter(torch.tensor(math.inf)), halfway.nextafter(-torch.tensor(math.inf))])
    return torch.cat([torch.cat([random, *beside]).to(torch.int32).view(torch.float32), around])


def pairs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bit patterns and normal values of a 16-bit format, some equal to each other."""
    generator = torch.Generator().manual_seed(2)
    bits = [torch.randint(-32768, 32768, (8192,), generator=generator).to(torch.int16).view(dtype) for _ in "xy"]
    normal = [torch.randn(8192, generator=generator).to(dtype) for _ in "xy"]
    x, y = (torch.cat(both) for both in zip(bits, normal, strict=True))
    y[::7] = x[::7]
    return x, y


def saturated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    return x.float().clamp(-largest, largest).to(dtype)


# --- Casts ----------------------------------------------------------------------------------------------------------

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@probe("bf16_casts")
def bf16_casts_round_to_nearest_even():
    same(cast(many_floats(), torch.bfloat16), many_floats().to(torch.bfloat16))
    same(cast(every(torch.float16), torch.bfloat16), every(torch.float16).to(torch.bfloat16))


@probe("bf16_casts")
def bf16_subnormals_survive():
    same(cast(every(torch.bfloat16), torch.float32), every(torch.bfloat16).float())
    same(cast(every(torch.bfloat16), torch.float16), every(torch.bfloat16).to(torch.float16))


@probe("fp8_casts")
def fp8_casts_round_to_nearest_even_saturate_and_keep_nan():
    for target in FP8:
        for x in (many_floats(), every(torch.float16), every(torch.bfloat16)):
            same(cast(x, target), saturated(x, target))


@probe("fp8_casts")
def fp8_values_widen_exactly():
    for source in FP8:
        for target in (torch.float32, torch.float16):
            same(cast(every(source), target), every(source).to(target))
    same(cast(every(torch.float8_e4m3fn), torch.bfloat16), every(torch.float8_e4m3fn).to(torch.bfloat16))


@probe(None, compiles=False)  # Triton 3.6 compiles this cast so that infinity becomes 65536
def e5m2_widens_to_bf16_exactly():
    same(cast(every(torch.float8_e5m2), torch.bfloat16), every(torch.float8_e5m2).to(torch.bfloat16))


@probe(None, compiles=False)
def narrowing_agrees_with_a_search_over_all_values():
    x = many_floats()
    x = x[x.isfinite()].double()
    for dtype in (*FP8, torch.bfloat16):
        grid = every(dtype).double()
        grid = grid[grid.isfinite()].unique()
        x_in = x.clamp(grid[0], grid[-1])
        above = torch.searchsorted(grid, x_in).clamp(1, len(grid) - 1)
        low, high = grid[above - 1], grid[above]
        # Of two neighbours that are equally near, the even one is the one that is a multiple of twice their distance.
        tie_low = torch.fmod(low, 2 * (high - low)) == 0
        nearest = torch.where((x_in - low < high - x_in) | ((x_in - low == high - x_in) & tie_low), low, high)
        ours = cast(x.float(), dtype)
        inside = ours.double().isfinite()
        same(ours.double()[inside], nearest[inside])
        assert inside.all() or dtype == torch.bfloat16


@probe("bf16_from_other_types")
def integers_and_booleans_become_bf16():
    x = torch.arange(-70000, 70000, dtype=torch.int32)
    same(cast(x, torch.bfloat16), x.to(torch.bfloat16))
    same(cast(x > 0, torch.bfloat16), (x > 0).to(torch.bfloat16))


@probe("bf16_constants")
def bf16_takes_constants():
    @triton.jit
    def scale(x, y):
        return x * 1.7

    @triton.jit
    def fill(x, y):
        return tl.full(x.shape, 0.3, tl.bfloat16)

    x, y = pairs(torch.bfloat16)
    same(mapped(scale, x, y), x * torch.tensor(1.7, dtype=torch.bfloat16))
    same(mapped(fill, x, y), torch.full_like(x, 0.3))


# --- Arithmetic -----------------------------------------------------------------------------------------------------


@triton.jit
def add(x, y):
    return x + y


@triton.jit
def subtract(x, y):
    return x - y


@triton.jit
def multiply(x, y):
    return x * y


@triton.jit
def divide(x, y):
    return x / y


@triton.jit
def negate(x, y):
    return -x


@triton.jit
def magnitude(x, y):
    return tl.abs(x)


@triton.jit
def less(x, y):
    return x < y


@triton.jit
def less_equal(x, y):
    return x <= y


@triton.jit
def equal(x, y):
    return x == y


@triton.jit
def unequal(x, y):
    return x != y


@triton.jit
def larger(x, y):
    return tl.where(x > y, x, y)


@probe("bf16_arithmetic")
def bf16_arithmetic_rounds_once():
    x, y = pairs(torch.bfloat16)
    for function, truth in ((add, x + y), (subtract, x - y), (multiply, x * y), (negate, -x)):
        same(mapped(function, x, y), truth)


@probe("bf16_arithmetic")
def bf16_comparisons_compare_values():
    x, y = pairs(torch.bfloat16)
    for function, truth in ((less, x < y), (less_equal, x <= y), (equal, x == y), (unequal, x != y)):
        same(mapped(function, x, y, torch.int32), truth.int())
    same(mapped(larger, x, y), torch.where(x > y, x, y))


@probe(None)
def bf16_magnitudes_drop_the_sign():
    x, y = pairs(torch.bfloat16)
    same(mapped(magnitude, x, y), x.abs())


@probe(None, compiles=False)  # compiled, division is approximate
def bf16_division_happens_in_float32():
    x, y = pairs(torch.bfloat16)
    same(mapped(divide, x, y, torch.float32), x.float() / y.float())


@probe("bf16_casts")
def comparisons_yield_booleans():
    @triton.jit
    def less_as_bf16(x, y):
        return (x < y).to(tl.bfloat16)

    @triton.jit
    def between(x, y):
        return ((x < y) & (y < 1.0)).to(tl.bfloat16).to(tl.float32)

    x, y = (z.float() for z in pairs(torch.bfloat16))
    same(mapped(less_as_bf16, x, y, torch.bfloat16), (x < y).to(torch.bfloat16))
    same(mapped(between, x, y), ((x < y) & (y < 1)).float())


@triton.jit
def fused(x, y):
    return tl.fma(x, y, x)


@probe("fused_multiply_add")
def fused_multiply_add_rounds_once():
    generator = torch.Generator().manual_seed(3)
    for dtype, bits in ((torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)):
        x, y = (torch.randn(2048, generator=generator).to(dtype) for _ in "xy")
        if dtype == torch.bfloat16:
            x[0] = y[0] = 3.7830236869912166e17  # the product is a tie, which the addend breaks 58 bits further down
        exact = [Fraction(a) * Fraction(b) + Fraction(a) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
        same(mapped(fused, x, y), torch.tensor([_rounded(e, bits) for e in exact], dtype=torch.float64).to(dtype))


def _rounded(exact: Fraction, bits: int) -> float:
    """To nearest even with so many bits; no subnormals."""
    if not exact:
        return 0.0
    exponent = math.floor(math.log2(abs(exact))) + 1 - bits
    return float(round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def _with_nan() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor([1.0, math.nan, -3.0, math.nan, math.inf, -math.inf, 0.5, 5.0])
    y = torch.tensor([math.nan, 2.0, 4.0, math.nan, 1.0, math.nan, 0.25, 7.0])
    return x, y


@probe("nan_rules")
def minimum_and_maximum_prefer_numbers_to_nan():
    @triton.jit
    def minimum(x, y):
        return tl.minimum(x, y)

    @triton.jit
    def maximum(x, y):
        return tl.maximum(x, y)

    x, y = _with_nan()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        same(mapped(minimum, x.to(dtype), y.to(dtype)), torch.fmin(x, y).to(dtype))
        same(mapped(maximum, x.to(dtype), y.to(dtype)), torch.fmax(x, y).to(dtype))


@probe("nan_rules")
def clamp_brings_nan_to_the_lower_bound():
    @triton.jit
    def clamp(x, y):
        return tl.clamp(x, -1.0, 2.0)

    x, y = _with_nan()
    same(mapped(clamp, x, y), x.nan_to_num(-1.0).clamp(-1, 2))


@probe(None)
def propagate_nan_is_obeyed():
    @triton.jit
    def minimum(x, y):
        return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def maximum(x, y):
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def clamp(x, y):
        return tl.clamp(x, -1.0, 2.0, propagate_nan=tl.PropagateNan.ALL)

    x, y = _with_nan()
    for function, truth in ((minimum, torch.minimum(x, y)), (maximum, torch.maximum(x, y)), (clamp, x.clamp(-1, 2))):
        same(mapped(function, x, y), truth)


@probe("unsigned_invert")
def unsigned_bits_invert():
    @triton.jit
    def invert(x, y):
        return ~x & y

    x = torch.arange(256).to(torch.uint8)
    same(mapped(invert, x, x.flip(0)), ~x & x.flip(0))


# --- dot and atomics ------------------------------------------------------------------------------------------------


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + n[:, None] * K + k[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, tl.trans(y), input_precision="ieee"))


def dot(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(len(a), len(b), dtype=dtype, device=DEVICE)
    dot_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), out, M=len(a), N=len(b), K=a.shape[1])
    return out.cpu()


def _small_integers(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(shape[0])).float()


@probe("narrow_dot")
def bf16_dot_multiplies_values():
    a, b = _small_integers(32, 64), _small_integers(16, 64)
    a[3, 3], b[5, 5] = math.nan, math.inf
    same(dot(a.bfloat16(), b.bfloat16()), a @ b.T)


@probe(None)
def fp8_dot_keeps_nan():
    for dtype in FP8:
        a, b = _small_integers(64, 64), _small_integers(32, 64)
        a[3, 3] = math.nan
        same(dot(a.to(dtype), b.to(dtype)), a.to(dtype).float() @ b.to(dtype).float().T)


@probe(None)
def float32_and_int8_dots_accumulate_in_their_own_types():
    a, b = _small_integers(32, 64), _small_integers(16, 64)
    same(dot(a / 1024, b), (a @ b.T) / 1024)
    same(dot(a.to(torch.int8) * 15, b.to(torch.int8) * 15, torch.int32), ((a * 15) @ (b * 15).T).int())


@triton.jit
def atomic_kernel(out, where, x, old, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(old + i, tl.atomic_add(out + tl.load(where + i), tl.load(x + i), mask=i < n), mask=i < n)


def atomic_add(start: torch.Tensor, x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, old = start.to(DEVICE).clone(), torch.zeros_like(x, device=DEVICE)
    where = torch.arange(len(x), dtype=torch.int32, device=DEVICE) % len(start)
    atomic_kernel[(1,)](out, where, x.to(DEVICE), old, n, BLOCK=len(x))
    return out.cpu(), old.cpu()


def _check_atomic_add(dtype: torch.dtype) -> None:
    out, old = atomic_add(torch.ones(8, dtype=dtype), (torch.arange(16) + 1).to(dtype), 13)
    same(out, torch.tensor([11, 13, 15, 17, 19, 7, 8, 9]).to(dtype))
    truth = torch.tensor([1] * 8 + [2, 3, 4, 5, 6] + [0] * 3).to(dtype)
    same(old, truth)


@probe("narrow_atomic_add")
def bf16_atomic_add_adds_lane_by_lane():
    _check_atomic_add(torch.bfloat16)


@probe("narrow_atomic_add")
def fp16_atomic_add_rounds_subnormal_sums():
    start, x = torch.full((4,), 2.0**-14, dtype=torch.float16), torch.full((4,), 2.0**-24, dtype=torch.float16)
    same(atomic_add(start, x, 4)[0], start + x)
    start, x = torch.full((4,), 65504.0, dtype=torch.float16), torch.full((4,), 65504.0, dtype=torch.float16)
    same(atomic_add(start, x, 4)[0], start + x)


@probe(None)
def atomic_add_obeys_its_mask():
    for dtype in (torch.int32, torch.float32, torch.float16):
        _check_atomic_add(dtype)


# --- Reductions, scans and what is built on them --------------------------------------------------------------------


@triton.jit
def sum_of_row(x):
    return tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def exclusive_or_of_row(x):
    return tl.xor_sum(x, axis=-1, keep_dims=True)


@triton.jit
def raw_sum_scan(x):
    return tl.associative_scan(x, -1, tl.standard._sum_combine)


@triton.jit
def running_sum(x):
    return tl.cumsum(x, axis=1)


@triton.jit
def running_sum_from_the_end(x):
    return tl.cumsum(x, axis=-1, reverse=True)


@triton.jit
def then(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def recurrence(x):
    return tl.associative_scan((x % 3 - 1, x), -1, then)[1]


@triton.jit
def absolute_larger(a, b):
    if tl.abs(a) > tl.abs(b):
        return a
    return b


def _integers(rows: int, cols: int, low: int = 0, high: int = 9) -> torch.Tensor:
    return torch.randint(low, high, (rows, cols), generator=torch.Generator().manual_seed(cols)).to(torch.int32)


@probe("narrow_sums")
def bf16_sums_add_values():
    x = _integers(8, 32, -8, 8)
    same(by_row(sum_of_row, x.bfloat16()), x.sum(1, keepdim=True).bfloat16())
    same(by_row(raw_sum_scan, x.bfloat16(), 32), x.cumsum(1).bfloat16())


@probe("narrow_sums", compiles=False)  # the order of a compiled reduction is its own affair
def partial_sums_in_16_bits_are_rounded():
    x = torch.ones(1, 64)
    x[0, 0] = 2048
    same(by_row(sum_of_row, x.half()), torch.tensor([[2110.0]]).half())  # 2111 + 1 in float32
    x[0, 0] = 256
    same(by_row(sum_of_row, x.bfloat16()), torch.tensor([[318.0]]).bfloat16())


@probe("narrow_sums")
def sums_over_everything_are_scalars():
    @triton.jit
    def total(x):
        return tl.sum(x)[None, None]

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32):
        same(by_row(total, torch.ones(1, 32).to(dtype)), torch.tensor([[32]]).to(dtype))


def _reference_recurrence(x: torch.Tensor) -> torch.Tensor:
    state, states = torch.zeros(len(x), 1, dtype=torch.int32), []
    for column in x.split(1, dim=1):
        state = state * (column % 3 - 1) + column
        states.append(state)
    return torch.cat(states, 1)


@probe("negative_axes")
def axes_count_from_the_end():
    @triton.jit
    def largest_magnitude(x):
        return tl.reduce(x, -1, absolute_larger, keep_dims=True)

    @triton.jit
    def largest_magnitude_so_far(x):
        return tl.associative_scan(x, -1, absolute_larger)

    x = _integers(8, 32, -99, 99)
    same(by_row(largest_magnitude, x).abs(), x.abs().amax(1, keepdim=True))
    same(by_row(largest_magnitude_so_far, x, 32).abs(), x.abs().cummax(1).values)


@probe(None)
def combine_functions_keep_the_order_of_their_operands():
    x = _integers(8, 32)
    same(by_row(recurrence, x, 32), _reference_recurrence(x))
    truth = torch.zeros(8, 1, dtype=torch.int32)
    for column in x.split(1, dim=1):
        truth ^= column
    same(by_row(exclusive_or_of_row, x), truth)


@probe(None)
def scans_run_in_both_directions():
    x = _integers(8, 32)
    for dtype, out in ((torch.int32, torch.int32), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)):
        same(by_row(running_sum, x.to(dtype), 32, out), x.cumsum(1).to(out))
        same(by_row(running_sum_from_the_end, x.to(dtype), 32, out), x.flip(1).cumsum(1).flip(1).to(out))


@triton.jit
def argmax(x):
    return tl.argmax(x, axis=1, keep_dims=True)


@triton.jit
def argmin(x):
    return tl.argmin(x, axis=-1, keep_dims=True)


@triton.jit
def maximum_of_row(x):
    return tl.max(x, axis=1, keep_dims=True)


@triton.jit
def minimum_of_row(x):
    return tl.min(x, axis=-1, keep_dims=True)


@probe(None)
def argmax_and_argmin_take_the_leftmost_of_equals():
    x = _integers(32, 64)
    x[7] = 3
    for dtype in (torch.int32, torch.float32, torch.bfloat16, torch.float16):
        first = [
            [[int((row == best).nonzero()[0])] for row, best in zip(x, bests, strict=True)]
            for bests in (x.amax(1), x.amin(1))
        ]
        same(by_row(argmax, x.to(dtype), 1, torch.int32), torch.tensor(first[0], dtype=torch.int32))
        same(by_row(argmin, x.to(dtype), 1, torch.int32), torch.tensor(first[1], dtype=torch.int32))


@probe(None)
def argmax_without_tie_breaking_is_some_maximum():
    @triton.jit
    def some_argmax(x):
        return tl.argmax(x, axis=1, tie_break_left=False, keep_dims=True)

    x = _integers(32, 64)
    found = by_row(some_argmax, x)
    same(x.gather(1, found.long()), x.amax(1, keepdim=True))


@probe(None)
def maxima_ignore_nan():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    x[1, 5] = x[2, 0] = x[3, 63] = math.nan
    x[4] = math.nan
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = x.to(dtype).float()
        best, least = torch.full((8, 1), math.nan), torch.full((8, 1), math.nan)
        for column in y.split(1, dim=1):
            best, least = torch.fmax(best, column), torch.fmin(least, column)
        same(by_row(maximum_of_row, x.to(dtype), 1, torch.float32), best)
        same(by_row(minimum_of_row, x.to(dtype), 1, torch.float32), least)


@probe("extremes", compiles=False)  # compiled, the order decides what comes out
def argmax_may_lose_the_maximum_to_nan():
    x = torch.zeros(2, 8)
    x[0, 1], x[0, 3], x[0, 6] = 9.0, math.nan, 2.0
    same(by_row(argmax, x, 1, torch.int32), torch.tensor([[6], [0]], dtype=torch.int32))


@probe("extremes")
def argmax_returns_the_indices_given():
    @triton.jit
    def argmax_of_shuffled(x):
        index = (tl.arange(0, 64) * 5 + 3) % 64
        index = tl.broadcast_to(index[None, :], x.shape)
        return tl.reduce((x, index), 1, tl.standard._argmax_combine_tie_break_left, keep_dims=True)[1]

    x = _integers(32, 64)
    index = (torch.arange(64) * 5 + 3) % 64
    truth = torch.where(x == x.amax(1, keepdim=True), index, 64).amin(1, keepdim=True)
    same(by_row(argmax_of_shuffled, x), truth.int())


@probe("extremes", compiles=False)  # compiled, this combine function makes float32 of bfloat16, and is refused
def bf16_maxima_compare_values():
    @triton.jit
    def raw_maximum(x):
        return tl.reduce(x, 1, tl.standard._elementwise_max, keep_dims=True)

    x = _integers(32, 64, -9, 9).bfloat16()
    same(by_row(raw_maximum, x), x.amax(1, keepdim=True))


@probe("block_combine", compiles=False)
def combine_functions_run_on_whole_blocks():
    x = _integers(8, 32)
    assert_calls(lambda: by_row(recurrence, x, 32), fewer_than=8000)
    assert_calls(lambda: by_row(sort_rows, x, 32), fewer_than=20000)


@probe(None)
def tensors_have_reduce_and_scan_methods():
    @triton.jit
    def sum_by_method(x):
        return x.associative_scan(1, add).to(x.dtype) * 0 + x.reduce(1, add, keep_dims=True)

    x = _integers(8, 32)
    same(by_row(sum_by_method, x, 32), x.sum(1, keepdim=True).int().expand(8, 32).contiguous())


@triton.jit
def sort_rows(x):
    return tl.sort(x)


@triton.jit
def sort_rows_descending(x):
    return tl.sort(x, descending=True)


@triton.jit
def top_four(x):
    return tl.topk(x, 4)


@probe(None)
def rows_sort():
    for x in (_integers(8, 32, -99, 99), torch.randn(8, 64), torch.randn(4, 32).bfloat16()):
        same(by_row(sort_rows, x, x.shape[1]), x.sort(1).values)
        same(by_row(sort_rows_descending, x, x.shape[1]), x.sort(1, descending=True).values)
        same(by_row(top_four, x, 4), x.topk(4, 1).values)


@probe(None)
def rows_gather():
    @triton.jit
    def reverse(x):
        index = tl.broadcast_to(31 - tl.arange(0, 32)[None, :], x.shape)
        return tl.gather(x, index, 1)

    x = _integers(8, 32)
    same(by_row(reverse, x, 32), x.flip(1))


@triton.jit
def histogram_kernel(x, out, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.arange(0, BINS), tl.histogram(tl.load(x + i), BINS, mask=i < n))


def _histogram(x: torch.Tensor, n: int) -> torch.Tensor:
    out = torch.empty(8, dtype=torch.int32, device=DEVICE)
    histogram_kernel[(1,)](x.to(DEVICE), out, n, BINS=8, BLOCK=len(x))
    return out.cpu()


@probe(None)
def histograms_count_what_is_not_masked():
    x = _integers(1, 128, 0, 8)[0]
    same(_histogram(x, 100), x[:100].bincount(minlength=8).int())


@probe("histogram", compiles=False)
def histograms_refuse_values_outside_the_bins():
    x = _integers(1, 128, 0, 9)[0]
    refuses(lambda: _histogram(x, 128), triton.runtime.errors.InterpreterError)


@probe(None)
def softmax_normalises_rows():
    @triton.jit
    def softmax(x):
        return tl.softmax(x, 1, keep_dims=True)

    x = torch.randn(8, 32)
    assert (by_row(softmax, x, 32) - x.softmax(1)).abs().max() < 1e-6


# --- What a kernel may say ------------------------------------------------------------------------------------------


@triton.jit
def loop_kernel(out, n):
    total = 0
    for i in range(n):
        total += i
    for i in tl.range(1, n, 2, num_stages=2):  # pyright: ignore[reportGeneralTypeIssues] only jitted code iterates it
        total += i
    tl.store(out, total)


@probe("scalar_index")
def loops_take_run_time_bounds():
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    loop_kernel[(1,)](out, 10)
    same(out, torch.tensor([45 + 25], dtype=torch.int32))


@triton.jit
def scale_kernel(x, out, scale, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) * scale)


@triton.jit
def double_kernel(out, number, flag):
    if flag:
        tl.store(out, number + number)


@probe("scalar_arguments")
def float_arguments_promote_16_bit_blocks():
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(64).to(dtype)
        out = torch.zeros(64, device=DEVICE)
        scale_kernel[(1,)](x.to(DEVICE), out, 1.2345678, BLOCK=64)
        same(out, x.float() * torch.tensor(1.2345678))


@probe("scalar_arguments")
def large_integer_arguments_are_int64():
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    double_kernel[(1,)](out, 3_000_000_000, 1)
    same(out, torch.tensor([6_000_000_000]))


@probe(None)  # either of two repairs sees to it: upstream refuses them as it measures their arrays
def booleans_are_arguments():
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    double_kernel[(1,)](out, 3, True)
    double_kernel[(1,)](out, 4, False)
    same(out, torch.tensor([6]))


@probe("block_logic")
def logic_works_element_by_element():
    @triton.jit
    def both(x, y):
        return x < y and y < 1.0  # noqa: PLR1716 (what is tested)

    @triton.jit
    def either(x, y):
        return x < y or y < 1.0

    @triton.jit
    def neither(x, y):
        return not (x < y)

    x, y = torch.randn(512), torch.randn(512)
    for function, truth in ((both, (x < y) & (y < 1)), (either, (x < y) | (y < 1)), (neither, ~(x < y))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler would rather have & and |
            same(mapped(function, x, y, torch.int32), truth.int())


@probe("block_logic")
def branches_on_blocks_are_refused():
    @triton.jit
    def branch(x, y):
        z = y
        if x < y:
            z = x
        return z

    errors = (triton.runtime.errors.InterpreterError, triton.compiler.errors.CompilationError)
    refuses(lambda: mapped(branch, torch.randn(8), torch.randn(8)), *errors)


@probe(None)
def constants_short_circuit():
    @triton.jit
    def constant(x, y):
        nothing: tl.constexpr = None  # pyright: ignore[reportAssignmentType] the compiler wraps it
        if nothing is not None and nothing > 1:
            x = y
        if not nothing or x.shape[0] > 1:
            x += y
        return x

    x, y = torch.randn(8), torch.randn(8)
    same(mapped(constant, x, y), x + y)


@probe("kernel_namespace", compiles=False)
def kernels_see_only_their_own_names():
    mapped(add, torch.zeros(1), torch.zeros(1))
    assert "InterpreterBuilder" not in globals()


@triton.jit
def descriptor_kernel(x, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    block = x.load([1, 2, 0]).reshape(ROWS, COLS)
    tl.store(out + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :], block)


def _load_past_the_end(dtype: torch.dtype, padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 4, 16).to(dtype)
    out = torch.empty(8, 16, dtype=dtype, device=DEVICE)
    descriptor = TensorDescriptor(x.to(DEVICE), list(x.shape), list(x.stride()), [1, 8, 16], padding)
    descriptor_kernel[(1,)](descriptor, out, ROWS=8, COLS=16)
    truth = torch.full((8, 16), 0.0 if padding == "zero" else math.nan).to(dtype)
    truth[:2] = x[1, 2:]
    return out.cpu(), truth


@probe(None)
def descriptors_pad_with_zeros():
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        same(*_load_past_the_end(dtype, "zero"))


@probe("nan_padding")
def bf16_descriptors_pad_with_nan():
    same(*_load_past_the_end(torch.bfloat16, "nan"))


@triton.jit
def block_pointer_kernel(x, out, rows, ROWS: tl.constexpr, COLS: tl.constexpr):
    block = tl.make_block_ptr(x, (rows, COLS), (COLS, 1), (0, 0), (ROWS, COLS), (1, 0))
    value = tl.load(block, boundary_check=(0,), padding_option="nan")
    tl.store(out + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :], value)


@probe("nan_padding")
def bf16_block_pointers_pad_with_nan():
    x = torch.randn(5, 16).bfloat16()
    out = torch.empty(8, 16, dtype=torch.bfloat16, device=DEVICE)
    block_pointer_kernel[(1,)](x.to(DEVICE), out, 5, ROWS=8, COLS=16)
    same(out, torch.cat([x, torch.full((3, 16), math.nan).bfloat16()]))


@probe("gpu_only_functions")
def dependent_launch_and_libdevice_exist():
    @triton.jit
    def dependent(x, y):
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
        return libdevice.rint(x) + libdevice.tanh(y)  # pyright: ignore[reportOperatorIssue] stubs return nothing

    x, y = torch.randn(64) * 4, torch.randn(64)
    assert (mapped(dependent, x, y) - (x.round() + y.tanh())).abs().max() < 1e-6


# --- Speed ----------------------------------------------------------------------------------------------------------


def assert_calls(run: Callable[[], object], fewer_than: int, named: str | None = None) -> None:
    """Counts the calls that a second run makes, a measure of time that does not depend on the machine."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call" if named is None else event == "c_call" and argument.__name__ == named

    run()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    assert calls < fewer_than, f"{calls} calls, allowed are {fewer_than - 1}"


@triton.jit
def busy_kernel(out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.int32)
    for k in tl.static_range(8):
        total += i[:, None] * k + i[None, :] * n
    tl.store(out + i[:, None] * BLOCK + i[None, :], total)


def _busy() -> None:
    busy_kernel[(1,)](torch.empty(256, dtype=torch.int32), 3, BLOCK=16)


@triton.jit
def helpers_kernel(out):
    x = tl.cdiv(tl.cdiv(tl.cdiv(1000, 3), 3), 3)
    tl.store(out, x)


def _helpers() -> None:
    helpers_kernel[(1,)](torch.empty(1, dtype=torch.int32))


@probe("patch_once", compiles=False)
def launches_and_helpers_patch_nothing():
    assert_calls(_helpers, fewer_than=1000)


@probe("no_overflow_checks", compiles=False)
def integers_are_computed_once():
    assert_calls(_busy, fewer_than=7000)


@probe("shared_types", compiles=False)
def types_are_built_once():
    assert_calls(_busy, fewer_than=7000)


@probe("equal_operands", compiles=False)
def equal_operands_are_taken_as_they_are():
    assert_calls(_busy, fewer_than=4200)


@probe("plain_values", compiles=False)
def plain_values_are_taken_as_they_are():
    assert_calls(_busy, fewer_than=1000, named="isinstance")


@probe("unmeasured_handles", compiles=False)
def results_are_not_measured_against_their_types():
    assert_calls(_busy, fewer_than=3620)


@probe("no_host_copies", compiles=False)
def arguments_are_not_copied():
    assert_calls(_busy, fewer_than=1, named="copy_")


@probe("no_float_warnings", compiles=False)
def kernels_do_not_warn_of_infinity():
    @triton.jit
    def overflow(x, y):
        return tl.exp(x) / y

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(mapped(overflow, torch.tensor([1000.0]), torch.tensor([0.0])), torch.tensor([math.inf]))


# --- Memory ---------------------------------------------------------------------------------------------------------


@triton.jit
def shifted_kernel(x, out, n, shift, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n)
    if ATOMIC:
        tl.atomic_add(out + i + shift, value, mask=i < n)
    else:
        tl.store(out + i + shift, value, mask=i < n)


@triton.jit
def address_kernel(table, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(tl.load(table).to(tl.pointer_type(tl.float32)) + i))


@triton.jit
def descriptor_beyond_kernel(x, out, rows, ROWS: tl.constexpr, COLS: tl.constexpr):
    block = tl.make_tensor_descriptor(x, [rows, COLS], [COLS, 1], [ROWS, COLS]).load([0, 0])
    tl.store(out + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :], block)


def inside(numbers: int, around: int = 64) -> torch.Tensor:
    """A storage of its own amid memory that is there too, so that leaving it harms nobody where nothing forbids it."""
    return torch.from_numpy(numpy.zeros(numbers + 2 * around, numpy.float32)[around : around + numbers])


def leaves(run: Callable[[], object], words: str) -> None:
    said = "nothing"
    try:
        run()
    except OutOfBoundsError as error:
        said = str(error)
    assert words in said, said


@probe("memory_bounds", compiles=False)
def an_access_outside_the_arguments_is_an_error_that_says_where():
    x, out = inside(12), inside(16)
    run = shifted_kernel[(1,)]
    leaves(
        lambda: run(x, out, 12, 5, ATOMIC=False, BLOCK=32),
        "shifted_kernel writes 4 bytes outside its arguments: up to 4 bytes behind the end of out, whose memory has "
        "64 bytes; 1 of 12 active lanes (test_interpreter.py:",
    )
    leaves(lambda: run(x, out, 12, -3, ATOMIC=False, BLOCK=32), "up to 12 bytes before the start of out")
    leaves(lambda: run(x, out, 12, 5, ATOMIC=True, BLOCK=32), "shifted_kernel updates 4 bytes")
    leaves(lambda: run(x, out, 13, 0, ATOMIC=False, BLOCK=32), "shifted_kernel reads 4 bytes")
    leaves(lambda: run(inside(0), out, 1, 0, ATOMIC=False, BLOCK=32), "behind the end of x, whose memory has 0 bytes")
    same(out, torch.zeros(16))


@probe("memory_bounds", compiles=False)
def a_descriptor_of_more_rows_than_there_are_is_an_error():
    x, out = inside(4 * 16), inside(8 * 16)
    leaves(lambda: descriptor_beyond_kernel[(1,)](x, out, 8, ROWS=8, COLS=16), "descriptor_beyond_kernel reads 4 bytes")


@probe(None, compiles=False)
def what_is_allowed_stays_allowed():
    run = shifted_kernel[(1,)]
    whole = torch.arange(64.0)
    out = torch.zeros(64)
    run(whole[16:20], out[4:8], 16, 0, ATOMIC=False, BLOCK=32)  # views: from there on, in the same storage
    same(out[4:20], whole[16:32])
    run(whole, out[32:], 16, -16, ATOMIC=False, BLOCK=32)
    same(out[16:32], whole[:16])
    run(whole[3:4].expand(16), out, 1, 0, ATOMIC=False, BLOCK=32)
    run(torch.empty(0), torch.empty(0), 0, 0, ATOMIC=False, BLOCK=32)  # no active lane
    run(torch.empty(0), out, 0, 0, ATOMIC=True, BLOCK=32)


@probe(None, compiles=False)
def an_address_that_comes_as_a_number_is_nobodys_to_judge():
    x, out = torch.arange(16.0), torch.zeros(16)
    address_kernel[(1,)](torch.tensor([x.data_ptr()]), out, BLOCK=16)
    same(out, x)


# --- The children ---------------------------------------------------------------------------------------------------


def _guards() -> dict[str, str]:
    """What install() says of itself in the interpreted child."""

    def refusal(**arguments) -> str:
        try:
            interpreter.install(**arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    environment = dict(os.environ)
    said = {"active before": str(interpreter.is_active()), "first": refusal(), "second": refusal()}
    said |= {"other choice": refusal(without=["extremes"]), "active after": str(interpreter.is_active())}
    return said | {"environment": "kept" if environment == os.environ else "changed"}


def _in_a_fork(work: Callable[[], dict[str, str]]) -> dict[str, str]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            json.dump(work(), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(text) if text else {"*": f"the process died with status {status}"}


def _verdicts_without(repair: str) -> dict[str, str]:
    interpreter.install(without=[repair])
    return {name: p.verdict() for name, p in PROBES.items() if p.repair == repair}


def _verdicts_with_all() -> dict[str, str]:
    interpreter.install()
    return {name: p.verdict() for name, p in PROBES.items()}


def _interpreted() -> dict[str, dict[str, str]]:
    report = {"guards": _in_a_fork(_guards), "repaired": _in_a_fork(_verdicts_with_all)}
    return report | {repair: _in_a_fork(lambda r=repair: _verdicts_without(r)) for repair in interpreter.REPAIRS}


def _compiled() -> dict[str, dict[str, str]]:
    global DEVICE
    try:
        interpreter.install()
    except interpreter.UnsupportedInterpreterError as error:
        said = str(error)
    else:
        said = "accepted"
    report = {"guards": {"compiled": said, "active": str(interpreter.is_active())}}
    # Older GPUs lack fp8 and bfloat16 atomics; AMD's casts are others.
    if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() >= (9, 0):
        DEVICE = "cuda"
        report["compiled"] = {name: p.verdict() for name, p in PROBES.items() if p.compiles}
    return report


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, str]]]:
    """What both children found, by the name of the mode."""
    folder = tmp_path_factory.mktemp("interpreter")
    children = {}
    for mode in ("interpreted", "compiled"):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if mode == "interpreted":
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, __file__, mode, str(folder / mode)]
        children[mode] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for mode, child in children.items():
        _, stderr = child.communicate(timeout=600)
        assert child.returncode == 0, f"the {mode} child failed:\n{stderr[-4000:]}"
    return {mode: json.loads((folder / mode).read_text()) for mode in children}


# --- Tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBES)
def test_the_repaired_interpreter_is_right(reports, name):
    assert reports["interpreted"]["repaired"][name] == RIGHT


@pytest.mark.parametrize("name", [name for name, p in PROBES.items() if p.repair])
def test_the_interpreter_is_wrong_without_the_repair(reports, name):
    if PROBES[name].repair == "scalar_index" and numpy.lib.NumpyVersion(numpy.__version__) < "2.4.0":
        pytest.skip("numpy before 2.4 makes an integer of an array with one element")
    found = reports["interpreted"][PROBES[name].repair]
    assert found.get(name, found.get("*")) != RIGHT


@pytest.mark.parametrize("name", [name for name, p in PROBES.items() if p.compiles])
def test_compiled_kernels_say_the_same(reports, name):
    if "compiled" not in reports["compiled"]:
        pytest.skip("no Hopper or later GPU to compile for")
    assert reports["compiled"]["compiled"][name] == RIGHT


def test_every_repair_has_a_probe():
    assert {p.repair for p in PROBES.values()} - {None} == interpreter.REPAIRS.keys()


def test_installing_twice_is_installing_once(reports):
    said = reports["interpreted"]["guards"]
    assert (said["active before"], said["first"], said["second"], said["active after"]) == (
        "False",
        "accepted",
        "accepted",
        "True",
    )
    assert said["other choice"].startswith("UnsupportedInterpreterError: ")


def test_installing_leaves_the_environment_alone(reports):
    assert reports["interpreted"]["guards"]["environment"] == "kept"


def test_a_process_that_compiles_is_refused(reports):
    said = reports["compiled"]["guards"]
    assert "TRITON_INTERPRET=1 was not set" in said["compiled"]
    assert said["active"] == "False"


def test_another_triton_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(interpreter, "_installed", None)
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    with pytest.raises(interpreter.UnsupportedInterpreterError, match=r"3\.7\.1 .*3\.6\.x"):
        interpreter.install()


def test_an_unknown_repair_is_refused():
    with pytest.raises(ValueError, match="no such repair: spelling"):
        interpreter.install(without=["spelling"])


if __name__ == "__main__":
    found = {"interpreted": _interpreted, "compiled": _compiled}[sys.argv[1]]()
    pathlib.Path(sys.argv[2]).write_text(json.dumps(found, indent=1))
