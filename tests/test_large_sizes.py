"""Offsets beyond 2^31 elements: for real on a GPU that has the memory, by far-apart rows on the CPU.

On the CPU memory that is never touched is never used, so a tensor may span more elements than 32 bits count while a few
rows of it exist. Each stride stays below 2^31, for a larger one becomes 64-bit by itself and hides the fault. Where
rows are dense, only the last program of a launch runs: it has the largest offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from moegate.impl import path
from moegate.impl.batched import batched_experts
from moegate.impl.config import Activation, ActivationFunction
from moegate.impl.fused_moe import fused_experts
from moegate.impl.kernels import activation, batched_gemm, combine, grouped_gemm, quantize, tile
from moegate.impl.platform import Platform
from moegate.impl.quantization import ActivationScale
from moegate.impl.tuning.kernel_config import KernelConfig

INTERPRETED = Platform.of("cpu").interpreted
needs_interpreter = pytest.mark.skipif(
    not INTERPRETED or torch.cuda.is_available(), reason="memory that is never touched: TRITON_INTERPRET=1, on the CPU"
)
CPU = Platform.of("cpu")
# Each half of the rows has more elements than 32 bits count, in a whole number of the kernels' blocks.
ROWS, COLUMNS = 1 << 20, 4112
FAR = (1 << 30) + 16  # a stride; three rows of it span more than 2^31 elements
TILE = KernelConfig(16, 32, 32, 1, 4, 1)


@pytest.fixture(autouse=True)
def _untouched_memory() -> Iterator[None]:
    """What is never written must not be filled either."""
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = was


def far_apart(values: torch.Tensor, *strides: int) -> torch.Tensor:
    """A copy whose leading axes have these strides, in elements, and whose others are dense."""
    dense = list(torch.empty(values.shape[len(strides) :], device="meta").stride())
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, (*strides, *dense), strict=True))
    view = torch.empty(span, dtype=values.dtype).as_strided(values.shape, (*strides, *dense))
    return view.copy_(values)


def vast(dtype: torch.dtype = torch.bfloat16, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    """Dense rows that are never touched but by what a test writes there."""
    return torch.empty((rows, columns), dtype=dtype)


@contextmanager
def last_program_alone() -> Iterator[None]:
    """Each launch runs its last program and no other."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    place, size = builder.set_grid_idx, builder.set_grid_dim

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        whole = (*grid, 1, 1)[:3]
        last = tuple(n - 1 for n in whole)
        with (
            mock.patch.object(builder, "set_grid_idx", side_effect=lambda *index: place(*last)),
            mock.patch.object(builder, "set_grid_dim", side_effect=lambda *dim: size(*whole)),
        ):
            kernel[(1,) * len(grid)](*arguments, **options)

    with mock.patch.object(path, "launch", launch):
        yield


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Bit-equal, or off by the last bits of float32 arithmetic done in another order and rounded to bfloat16."""
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=1e-5)


def layer(*, m: int = 3, e: int = 3, k: int = 2, h: int = 32, i: int = 32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(e, generator=generator)[:k] for _ in range(m)]).int()
    return {
        "hidden_states": numbers(m, h),
        "w13": numbers(e, 2 * i, h, seed=1) / 8,
        "w2": numbers(e, h, i, seed=2) / 8,
        "topk_weights": torch.rand(m, k, generator=generator),
        "topk_ids": ids,
    }


@needs_interpreter
@pytest.mark.parametrize("naive", [False, True], ids=["aligned", "naive"])
@pytest.mark.parametrize(
    ("operand", "strides"),
    [
        ("hidden_states", (FAR,)),
        ("w13", (FAR, 32)),
        ("w2", (FAR, 32)),
        ("topk_weights", (FAR,)),
        ("topk_ids", (FAR,)),
        ("w13_bias", (FAR,)),
        ("w2_bias", (FAR,)),
    ],
)
def test_a_layer_whose_operand_spans_more_than_32_bits_is_the_same_layer(operand, strides, naive):
    operands = layer(e=24, k=2) if naive else layer()
    experts, rows, _ = operands["w13"].shape
    operands |= {"w13_bias": numbers(experts, rows, seed=3), "w2_bias": numbers(experts, 32, seed=4)}
    if naive:
        operands["topk_ids"][-1, 0] = experts - 1
    if naive and operand not in ("hidden_states", "topk_weights", "topk_ids"):
        # Few of 24 experts exist: more of them would span more memory than there are addresses for.
        strides = (FAR // 8, *strides[1:])
    want = fused_experts(**operands, backend="triton")
    got = fused_experts(**operands | {operand: far_apart(operands[operand], *strides)}, backend="triton")
    assert torch.equal(got, want)


@needs_interpreter
def test_rows_of_one_expert_may_be_as_far_apart_as_experts():
    """Between tiles of rows, and, where not even a tile's rows are within 32 bits of each other, inside a tile."""
    operands = layer(e=2)
    want = fused_experts(**operands, backend="triton")
    for name, stride in (("w13", (1 << 26) + 16), ("w2", (1 << 27) + 16)):
        far = far_apart(operands[name], operands[name].shape[1] * stride, stride)
        assert torch.equal(fused_experts(**operands | {name: far}, backend="triton"), want)


@needs_interpreter
def test_a_result_may_span_more_than_32_bits():
    operands = layer()
    out = far_apart(torch.zeros(3, 32, dtype=torch.bfloat16), FAR)
    fused_experts(**operands, backend="triton", out=out)
    assert torch.equal(out, fused_experts(**operands, backend="triton"))


@needs_interpreter
@pytest.mark.parametrize(
    ("operand", "strides"),
    [
        ("hidden_states", (FAR, 32)),
        ("hidden_states", (32, FAR)),
        ("w13", (FAR, 32)),
        ("w2", (FAR, 32)),
        ("w13_bias", (FAR,)),
        ("w2_bias", (FAR,)),
        ("out", (FAR, 32)),
        ("out", (32, FAR)),
    ],
)
def test_slabs_and_their_rows_may_span_more_than_32_bits(operand, strides):
    operands = layer(e=3)
    batched = {
        "hidden_states": numbers(3, 4, 32),
        "w13": operands["w13"],
        "w2": operands["w2"],
        "w13_bias": numbers(3, 64, seed=3),
        "w2_bias": numbers(3, 32, seed=4),
        "expert_num_tokens": torch.tensor([4, 1, 3], dtype=torch.int32),
    }
    want = batched_experts(**batched, backend="triton")
    batched["out"] = torch.zeros_like(want)
    batched[operand] = far_apart(batched[operand], *strides)
    assert torch.equal(batched_experts(**batched, backend="triton"), want)


def pairs(count: int) -> quantize.Rows:
    """`count` pairs, of which only the last one's id is ever looked at."""
    ids = torch.empty((count // 2, 2), dtype=torch.int32)
    ids[-64:] = 0
    return quantize.Rows("pairs", count, topk_ids=ids, num_experts=1, num_local_experts=1)


def slabs(count: int) -> quantize.Rows:
    """Four full slabs: two would be so large that the stride between them is 64-bit by itself."""
    return quantize.Rows(
        "slabs", count, expert_num_tokens=torch.full((4,), count // 4, dtype=torch.int32), max_tokens=count // 4
    )


ROWS_OF = {"pairs": pairs, "slabs": slabs}


@needs_interpreter
@pytest.mark.parametrize("kind", ROWS_OF)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_activation_reaches_the_last_row(kind, interleaved):
    gate_up, out = vast(columns=2 * COLUMNS), vast()
    function = ActivationFunction(Activation.SILU, interleaved=interleaved)
    gate_up[-1] = row = numbers(2 * COLUMNS)
    with last_program_alone():
        activation.activate(out, gate_up, function, ROWS_OF[kind](ROWS), CPU)
    gate, up = (row[0::2], row[1::2]) if interleaved else row.chunk(2)
    close(out[-1, -16:], (torch.nn.functional.silu(gate.float()) * up.float())[-16:])


@needs_interpreter
@pytest.mark.parametrize("kind", ROWS_OF)
@pytest.mark.parametrize("scale", [ActivationScale.GROUP, ActivationScale.TOKEN])
def test_the_quantised_activation_reaches_the_last_row_and_its_scale(kind, scale):
    gate_up, out = vast(columns=2 * COLUMNS), vast(torch.int8)
    gate_up[-1] = row = numbers(2 * COLUMNS)
    with last_program_alone():
        scales = activation.activate_and_quantize(
            out, gate_up, ActivationFunction(), scale, 16, None, ROWS_OF[kind](ROWS)
        )
    gate, up = row.float().chunk(2)
    hidden = (torch.nn.functional.silu(gate) * up).bfloat16().float()
    close(out[-1, -16:].float() * scales[-1, -1], (hidden[-16:] / scales[-1, -1]).round() * scales[-1, -1])
    close(scales[-1, -1], (hidden[-16:] if scale is ActivationScale.GROUP else hidden).abs().max() / 127)


@needs_interpreter
@pytest.mark.parametrize("kind", ["tokens", *ROWS_OF])
@pytest.mark.parametrize("scale", [ActivationScale.GROUP, ActivationScale.TENSOR])
def test_quantised_rows_reach_the_last_row(kind, scale):
    x = vast()
    x[-1] = row = numbers(COLUMNS)
    rows = None if kind == "tokens" else ROWS_OF[kind](ROWS)
    amax = row.abs().max().float().view(1)
    with last_program_alone(), mock.patch.object(quantize, "largest_magnitude", return_value=amax):
        values, scales = quantize.quantize_rows(x, torch.int8, scale, 16, rows=rows)
    last = row[-16:].float()
    want = last.abs().max() / 127 if scale is ActivationScale.GROUP else amax[0] / 127
    if scale is ActivationScale.GROUP:
        close(scales[-1, -1], want)
    assert torch.equal(values[-1, -16:], (last / want).round().to(torch.int8))


@needs_interpreter
@pytest.mark.parametrize("kind", ["tokens", *ROWS_OF])
def test_the_largest_magnitude_is_looked_for_in_the_last_row(kind):
    x = vast()
    x[-64:] = 0
    x[-1, -1] = -3.0
    rows = quantize.Rows("tokens", ROWS) if kind == "tokens" else ROWS_OF[kind](ROWS)
    with last_program_alone():
        assert quantize.largest_magnitude(x, rows).tolist() == [3.0]


@needs_interpreter
def test_the_sum_over_the_choices_reaches_the_last_row():
    y, out = vast(), torch.empty((ROWS // 2, COLUMNS), dtype=torch.bfloat16)
    y[-2:] = numbers(2, COLUMNS)
    ids = torch.empty((ROWS // 2, 2), dtype=torch.int32)
    ids[-64:] = 0
    with last_program_alone():
        combine.combine(out, y, ids, None, 1, 1, CPU)
    close(out[-1, -16:], y[-2:].float().sum(dim=0)[-16:])


def gemm_of_the_last_pair(c: torch.Tensor, a: torch.Tensor, operands: Any, *, top_k: int, **options: Any) -> None:
    """One block, which holds the last of all pairs alone."""
    num_pairs = c.shape[0]
    ids = torch.empty((num_pairs // top_k, top_k), dtype=torch.int32)
    weights = torch.empty((num_pairs // top_k, top_k))
    weights[-1] = 0.5
    block = torch.full((16,), num_pairs, dtype=torch.int32)
    block[0] = num_pairs - 1
    with last_program_alone():
        grouped_gemm.grouped_gemm(
            c,
            a,
            operands,
            topk_ids=ids,
            topk_weights=weights,
            mul_weight=True,
            sorted_token_ids=block,
            expert_ids=torch.zeros(1, dtype=torch.int32),
            allow_tf32=False,
            **{"config": TILE, **options},
        )


@needs_interpreter
def test_the_gemm_writes_the_last_row_of_its_result():
    c, a, b = vast(), torch.empty((ROWS // 2, 32), dtype=torch.bfloat16), numbers(1, COLUMNS, 32, seed=1)
    a[-1] = numbers(32)
    gemm_of_the_last_pair(c, a, tile.gemm_operands(b), top_k=2, a_row_is_token=True)
    close(c[-1, -16:], 0.5 * (a[-1].float() @ b[0].float().T)[-16:])


@needs_interpreter
def test_the_gemm_reads_the_last_row_of_its_operand():
    c, a, b = torch.empty((ROWS, 32), dtype=torch.bfloat16), vast(), numbers(1, 32, COLUMNS, seed=1)
    a[-1] = numbers(COLUMNS)
    gemm_of_the_last_pair(c, a, tile.gemm_operands(b), top_k=2, a_row_is_token=False)
    close(c[-1], 0.5 * (a[-1].float() @ b[0].float().T))


@needs_interpreter
@pytest.mark.parametrize("granularity", ["channel", "block", "group"])
def test_the_gemm_finds_the_scales_of_the_last_of_very_many_experts(granularity):
    """All experts share their numbers here, and each has scales of its own: those span more than 32 bits."""
    experts, n, k = {
        "channel": (1 << 20, 4096, 16),
        "block": (1 << 17, 1024, 4096),
        "group": ((1 << 15) + 512, 1024, 2048),
    }[granularity]
    is_int4 = granularity == "group"
    b = torch.randint(0, 127, (n, k // 2 if is_int4 else k), generator=torch.Generator().manual_seed(0))
    b = b.to(torch.uint8 if is_int4 else torch.int8)
    shape = {"channel": (n,), "block": (n // 16, k // 16), "group": (n, k // 16)}[granularity]
    scale, zero = torch.empty((experts, *shape), dtype=torch.float16), None
    scale[-1] = torch.rand(shape, generator=torch.Generator().manual_seed(1)) / 64
    values = b.float()
    if is_int4:
        zero = torch.empty((experts, n // 2, k // 16), dtype=torch.uint8)
        zero[-1] = 0x53
        values = torch.stack([b & 15, b >> 4], dim=2).view(n, k).float()
        values[0::2] -= 3
        values[1::2] -= 5
    step = 0 if granularity == "channel" else 16
    options = {**tile._PLAIN, "B_SCALE": granularity, "B_FORMAT": "int4" if is_int4 else "int8", "SCALE_K": step}
    options["SCALE_N"] = 16 if granularity == "block" else 0
    numbers_of_scales = (0, 0, n) if granularity == "channel" else (*shape, n)
    operands = tile.GemmOperands(b.expand(experts, *b.shape), n, k, scale, zero, None, None, options, numbers_of_scales)
    a, c = numbers(1, k), torch.zeros((1, n), dtype=torch.bfloat16)
    with last_program_alone():
        grouped_gemm.grouped_gemm(
            c,
            a,
            operands,
            topk_ids=torch.zeros((1, 1), dtype=torch.int32),
            topk_weights=torch.ones((1, 1)),
            mul_weight=False,
            sorted_token_ids=torch.tensor([0] + [1] * 15, dtype=torch.int32),
            expert_ids=torch.tensor([experts - 1], dtype=torch.int32),
            a_row_is_token=True,
            allow_tf32=False,
            config=KernelConfig(16, 32, 16, 1, 4, 1),
        )
    scales = scale[-1].float()
    if granularity == "block":
        scales = scales.repeat_interleave(16, dim=0)
    scales = scales[:, None] if granularity == "channel" else scales.repeat_interleave(16, dim=1)
    want = a[0].float() @ (values * scales).T
    torch.testing.assert_close(c[0, -32:].float(), want[-32:], rtol=2**-6, atol=1e-2)


@needs_interpreter
def test_the_gemm_finds_the_scales_of_the_last_of_very_many_rows():
    rows, k = 1 << 22, 1 << 14
    a = torch.ones((1, k), dtype=torch.float8_e4m3fn).expand(rows, k)
    a_scale = torch.empty((rows, k // 16))
    a_scale[-1] = torch.rand(k // 16, generator=torch.Generator().manual_seed(0))
    b = torch.ones((1, 32, k), dtype=torch.float8_e4m3fn)
    options = {**tile._PLAIN, "A_SCALE": "group", "B_SCALE": "block", "SCALE_N": 32, "SCALE_K": 16}
    operands = tile.GemmOperands(b, 32, k, torch.ones((1, 1, k // 16)), None, None, a_scale, options, (1, k // 16, 32))
    c = torch.empty((rows, 32), dtype=torch.bfloat16)
    gemm_of_the_last_pair(c, a, operands, top_k=2, a_row_is_token=False, config=KernelConfig(16, 32, 16, 1, 4, 1))
    close(c[-1], torch.full((32,), 0.5 * 16 * float(a_scale[-1].sum())).bfloat16())


@needs_interpreter
def test_the_batched_gemm_writes_the_last_slab():
    rows = ROWS // 2
    c, a, b = vast().view(2, rows, COLUMNS), numbers(1, 1, 32).expand(2, rows, 32), numbers(2, COLUMNS, 32, seed=1)
    counts = torch.full((2,), rows, dtype=torch.int32)
    with last_program_alone():
        batched_gemm.batched_gemm(c, a, tile.gemm_operands(b), counts, allow_tf32=False, config=TILE)
    close(c[-1, -1, -16:], (a[-1, -1].float() @ b[-1].float().T)[-16:])
