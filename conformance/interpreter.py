"""Repairs of Triton's interpreter, so that a kernel needs no branch for it.

With ``TRITON_INTERPRET=1`` Triton runs kernels on the CPU, one program after the other, every operation in numpy. A
suite that must run without a GPU depends on it, yet version 3.6 gets some things wrong. It truncates float32 to
bfloat16 where the hardware rounds to nearest even, garbles fp8, computes with the bit patterns of bfloat16 as if they
were integers, and stops at numpy 2.4. A kernel that works around this carries code that no GPU ever runs, and a test
that tolerates it cannot see a rounding fault. So the interpreter is repaired instead:

    from moegate.conformance import interpreter
    interpreter.install()

Each repair is one function of `REPAIRS`, which says what is wrong upstream; `tests/test_interpreter.py` shows for each
that the wrong result comes back without it. What is right was taken from compiled kernels on Hopper, and the same
tests compare with them where they find such a GPU.

The last repairs are for speed, but for one, which keeps kernels inside their memory (`bounds.py`) and costs about 5 %.
A bfloat16 MoE layer on small shapes takes 0.21 of the time that it takes with nothing but `scalar_index` repaired, a
grouped GEMM 0.15, softmax with top-k 0.16, sorting 64 numbers 0.06.

What a kernel must avoid here: inline assembly, `tl.dot_scaled`, `tl.map_elementwise` and reductions into a descriptor
(`desc.atomic_add`) do not exist. Programs run in order, so one that waits for a later one hangs. What the GPU
approximates is exact: `tl.exp`, `/`, tf32, the accumulation of fp8 products; and `a * b + c` is not contracted into
one rounding as the compiler may do, in bfloat16 too. What the GPU leaves undefined comes out in one way of several:
float to integer out of range, argmax with NaN, argmax without tie breaking, a NaN clamped to `[-c, c]`.

The private parts of Triton that this relies on move between releases, hence `SUPPORTED`: another release is refused
until someone has run the tests against it.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as upstream

from .bounds import Memory, arguments_of, cause_of

SUPPORTED = ("3.6",)
"""Triton releases (major.minor) whose interpreter these repairs were tested against."""

REPAIRS: dict[str, Callable[[], None]] = {}
"""Every repair by name, in the order in which `install` applies them."""

_installed: frozenset[str] | None = None  # the repairs left out of this process, once `install` has run


class UnsupportedInterpreterError(RuntimeError):
    """This process does not run the interpreter that the repairs were written for."""


def install(*, without: Iterable[str] = ()) -> None:
    """Repair the interpreter of this process, once and for good; further calls do nothing.

    Args:
        without: Names from `REPAIRS` to leave out, for the tests that show what each is for.

    Raises:
        UnsupportedInterpreterError: Triton is not one of the `SUPPORTED` releases; or it compiles kernels in this
            process, because TRITON_INTERPRET was not set when it was imported (this module never sets it); or the
            interpreter was already repaired with another choice of `without`.
        ValueError: `without` names a repair that does not exist.
    """
    global _installed
    left_out = frozenset(without)
    unknown = left_out - REPAIRS.keys()
    if unknown:
        raise ValueError(f"no such repair: {', '.join(sorted(unknown))}; there are {', '.join(REPAIRS)}")
    if _installed is not None:
        if _installed != left_out:
            raise UnsupportedInterpreterError(
                f"the interpreter of this process was already repaired without {sorted(_installed)}; "
                f"it cannot be repaired again without {sorted(left_out)}"
            )
        return
    _check_version(triton.__version__)
    _check_mode()
    for name, repair in REPAIRS.items():
        if name not in left_out:
            repair()
    _installed = left_out


def is_active() -> bool:
    """Whether this process runs Triton's interpreter with the repairs."""
    return _installed is not None


def is_reversed() -> bool:
    """Whether launches run their programs last to first here and now (see `programs_reversed`)."""
    return is_active() and "set_grid_idx" in vars(upstream.interpreter_builder)


@contextmanager
def programs_reversed() -> Iterator[None]:
    """Every launch in this block runs its programs last to first, where the interpreter runs them at all.

    A GPU promises no order. Where two programs write to one place the interpreter always lets the last one win, which
    may be the right one; this lets the first win too.
    """
    if not is_active():
        yield
        return
    builder = upstream.interpreter_builder

    def set_grid_idx(*index: int) -> None:
        builder.grid_idx = tuple(size - 1 - i for i, size in zip(index, builder.grid_dim, strict=True))

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        del builder.set_grid_idx


def _check_version(version: str) -> None:
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise UnsupportedInterpreterError(
            f"Triton {version} is installed, but its interpreter can be repaired only in "
            f"{', '.join(f'{release}.x' for release in SUPPORTED)}"
        )


def _check_mode() -> None:
    # Triton's own library was decorated with @triton.jit when it was imported, so its type says which mode that was.
    if not isinstance(tl.standard.sum, upstream.InterpretedFunction):
        raise UnsupportedInterpreterError(
            "Triton compiles kernels in this process: TRITON_INTERPRET=1 was not set when it was imported. "
            "Set it in the environment that starts the process"
        )


def _repair(function: Callable[[], None]) -> Callable[[], None]:
    REPAIRS[function.__name__] = function
    return function


# --- Number formats -------------------------------------------------------------------------------------------------
# The interpreter stores bfloat16 as uint16 and fp8 as uint8. Values are computed in float32, which holds each exactly.

_FP8 = {  # name: (mantissa bits, smallest normal exponent, largest finite value, code of the quiet NaN)
    "fp8e4nv": (3, -6, 448.0, 0x7F),
    "fp8e5": (2, -14, 57344.0, 0x7F),
}
_NARROW = frozenset({"bf16", "fp16", *_FP8})


def _fp8_values(name: str) -> np.ndarray:
    """The float32 values of the 256 codes."""
    mantissa_bits, min_exponent, largest, _ = _FP8[name]
    code = np.arange(256)
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = (code & ((1 << mantissa_bits) - 1)) | ((exponent > 0) << mantissa_bits)
    value = np.ldexp(mantissa.astype(np.float32), np.maximum(exponent, 1) - 1 + min_exponent - mantissa_bits)
    if name == "fp8e5":
        value[value > largest] = np.nan
        value[code & 0x7F == 0x7C] = np.inf
    else:
        value[code & 0x7F == 0x7F] = np.nan
    return np.where(code & 0x80, -value, value)


_FP8_VALUES = {name: _fp8_values(name) for name in _FP8}


def _widen(data: np.ndarray, name: str) -> np.ndarray:
    """Storage of the format `name` as float32, exactly."""
    if name == "bf16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    if name in _FP8:
        return _FP8_VALUES[name][data]
    return data.astype(np.float32, copy=False)


def _narrow(values: np.ndarray, name: str) -> np.ndarray:
    """float32 values as storage of the format `name`, to nearest even; fp8 saturates, and NaN stays NaN."""
    if name == "bf16":
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)
    if name in _FP8:
        return _narrow_to_fp8(values, name)
    return values.astype(np.float16 if name == "fp16" else np.float32, copy=False)


def _narrow_to_fp8(values: np.ndarray, name: str) -> np.ndarray:
    # In units of the last place, m = rint(|x| / 2^(e - mantissa_bits)); the code is m plus the exponent field. A carry
    # out of the mantissa lands in the exponent by itself, and numpy's rint rounds halves to even.
    mantissa_bits, min_exponent, largest, nan = _FP8[name]
    magnitude = np.fmin(np.abs(values), np.float32(largest))
    exponent = np.maximum((magnitude.view(np.int32) >> 23) - 127, min_exponent)
    units = np.rint(np.ldexp(magnitude, mantissa_bits - exponent)).astype(np.int32)
    code = units + ((exponent - min_exponent) << mantissa_bits)
    code = np.where(np.isnan(values), nan, code | (np.signbit(values) << 7))
    return code.astype(np.uint8)


def _round_once(values: np.ndarray, name: str) -> np.ndarray:
    """float64 values as storage of the format `name`, to nearest even, without rounding to float32 on the way."""
    if name == "bf16":
        quantum = np.maximum(np.frexp(values)[1] - 8, -133)  # exponent of the last of 8 bits, or of the subnormals
        values = np.ldexp(np.rint(np.ldexp(values, -quantum)), quantum)
    return values.astype(np.float16) if name == "fp16" else _narrow(values.astype(np.float32), name)


# --- Casts ----------------------------------------------------------------------------------------------------------


def _repair_casts(formats: frozenset[str]) -> None:
    convert_upstream = upstream._convert_float
    known = _NARROW | {"fp32", "fp64"}

    def convert(data: np.ndarray, source_type: tl.dtype, target_type: tl.dtype, rounding: Any) -> np.ndarray:
        source, target = source_type.name, target_type.name
        if rounding == upstream._ir.ROUNDING_MODE.RTZ or not (
            (source in formats or target in formats) and source in known and target in known
        ):
            return convert_upstream(data, source_type, target_type, rounding)
        values = _widen(data, source)
        return values.astype(np.float64) if target == "fp64" else _narrow(values, target)

    upstream._convert_float = convert


@_repair
def bf16_casts() -> None:
    """Upstream truncates float32 to bfloat16, and loses bfloat16's subnormals.

    Truncation doubles the rounding error, has a bias toward zero, and turns some NaNs into infinities.
    """
    _repair_casts(frozenset({"bf16"}))


@_repair
def fp8_casts() -> None:
    """Upstream garbles fp8: rounding, overflow and NaN.

    It rounds halves up, drops the carry out of the mantissa, wraps around on overflow (500 becomes 256 in e4m3) and
    makes NaN a number. The GPU has cvt.rn.satfinite: nearest even, saturating (infinities too), NaN kept.
    """
    _repair_casts(frozenset(_FP8))


@_repair
def bf16_from_other_types() -> None:
    """Upstream stores an integer, a boolean or a float64 as the bit pattern of a bfloat16: 1 becomes 9.2e-41."""
    cast_upstream = upstream.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        if target.name != "bf16" or src.dtype.scalar.name == "fp32":
            return cast_upstream(self, src, dst_type)
        return upstream.TensorHandle(_round_once(src.data.astype(np.float64), "bf16"), target)

    upstream.InterpreterBuilder.cast_impl = cast_impl


@_repair
def bf16_constants() -> None:
    """Upstream cannot make a bfloat16 constant other than zero.

    So `x * 2.0` and `tl.full(shape, 1.0, tl.bfloat16)` fail.
    """

    def get_bf16(self: Any, value: float) -> Any:
        return upstream.TensorHandle(_narrow(np.array([value], dtype=np.float32), "bf16"), tl.bfloat16)

    upstream.InterpreterBuilder.get_bf16 = get_bf16


# --- Arithmetic -----------------------------------------------------------------------------------------------------


@_repair
def bf16_arithmetic() -> None:
    """Upstream computes and compares the bit patterns of bfloat16, as unsigned integers.

    The GPU rounds the exact result once. Float32 is wide enough that rounding through it gives the same.
    """
    binary_upstream = upstream.InterpreterBuilder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: np.ufunc) -> Any:
        if lhs.dtype.name != "bf16":
            return binary_upstream(self, lhs, rhs, op)
        result = op(_widen(lhs.data, "bf16"), _widen(rhs.data, "bf16"))
        if result.dtype == np.bool_:
            return upstream.TensorHandle(result, tl.int1)
        return upstream.TensorHandle(_narrow(result, "bf16"), tl.bfloat16)

    upstream.InterpreterBuilder.binary_op = binary_op


@_repair
def fused_multiply_add() -> None:
    """Upstream rounds the product of `tl.fma` before it adds, and computes on the bit patterns of bfloat16."""

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        dtype = z.dtype.scalar
        if not dtype.is_floating() or dtype.is_fp64():
            return upstream.TensorHandle(x.data * y.data + z.data, dtype)
        x, y, z = (_widen(operand.data, dtype.name).astype(np.float64) for operand in (x, y, z))
        product = x * y  # exact in float64
        total = product + z
        addend = total - product
        lost = (product - (total - addend)) + (z - addend)
        # Where bits were lost, make the last one odd: the total is then never mistaken for a tie when it is rounded.
        inexact = ((lost < 0) | (lost > 0)) & (total.view(np.int64) & 1 == 0)
        total = np.where(inexact, np.nextafter(total, np.copysign(np.inf, lost)), total)
        return upstream.TensorHandle(_round_once(total, dtype.name), dtype)

    upstream.InterpreterBuilder.create_fma = create_fma


@_repair
def nan_rules() -> None:
    """Upstream lets every minimum, maximum and clamp propagate NaN.

    Without PropagateNan.ALL the number wins, and NaN clamps to the lower bound.
    """

    def minimum(self: Any, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def maximum(self: Any, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self: Any, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        if propagate_nans == tl.PropagateNan.ALL:
            return self.ternary_op(arg, lo, hi, np.clip)
        return self.ternary_op(arg, lo, hi, lambda x, low, high: np.fmin(np.fmax(x, low), high))

    upstream.InterpreterBuilder.create_minnumf = minimum
    upstream.InterpreterBuilder.create_maxnumf = maximum
    upstream.InterpreterBuilder.create_clampf = create_clampf


@_repair
def unsigned_invert() -> None:
    """Upstream builds the all-ones value as -1, which numpy 2 refuses for unsigned types: `~mask` on uint8 fails."""

    def get_all_ones_value(self: Any, type: Any) -> Any:
        dtype = upstream._get_np_dtype(type)
        return upstream.TensorHandle(np.invert(np.zeros(1, dtype=dtype)), type.scalar)

    upstream.InterpreterBuilder.get_all_ones_value = get_all_ones_value


@_repair
def narrow_dot() -> None:
    """Upstream multiplies the bit patterns of bfloat16; and it converts fp8 to fp16 first, which is slow."""
    dot_upstream = upstream.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if d.dtype.name != "fp32" or a.dtype.name not in _NARROW or b.dtype.name not in _NARROW:
            return dot_upstream(self, a, b, d, *rest)
        product = np.matmul(_widen(a.data, a.dtype.name), _widen(b.data, b.dtype.name))
        return upstream.TensorHandle(product + d.data, d.dtype.scalar)

    upstream.InterpreterBuilder.create_dot = create_dot


@_repair
def narrow_atomic_add() -> None:
    """Upstream has no atomic addition for bfloat16, and a brittle one for fp16.

    The latter fails wherever a sum overflows, or is subnormal and inexact. Lanes may point at one address, so they
    are added one by one.
    """
    rmw_upstream = upstream.InterpreterBuilder.create_atomic_rmw

    def create_atomic_rmw(self: Any, operation: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        name = val.dtype.scalar.name
        if operation != upstream._ir.ATOMIC_OP.FADD or name not in ("bf16", "fp16"):
            return rmw_upstream(self, operation, ptr, val, mask, *rest)
        lanes = np.broadcast_arrays(ptr.data, val.data, mask.data)
        pointers, values, active = (np.ascontiguousarray(lane).reshape(-1) for lane in lanes)
        before = np.zeros_like(values)
        yes = np.ones(1, dtype=bool)
        for lane in np.flatnonzero(active):
            here = pointers[lane : lane + 1]
            old = upstream._interpreter.load(here, yes, before[:1], before.dtype)
            new = _narrow(_widen(old, name) + _widen(values[lane : lane + 1], name), name)
            upstream._interpreter.store(here, new, yes)
            before[lane] = old[0]
        return upstream.TensorHandle(before.reshape(lanes[0].shape), val.dtype.scalar)

    upstream.InterpreterBuilder.create_atomic_rmw = create_atomic_rmw


# --- Reductions and scans -------------------------------------------------------------------------------------------
# Every extent is a power of two. Where the order of a reduction shows (rounding, NaN), it is a tree over neighbours,
# one of the orders that a GPU may take.


def _wrap(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    """Storage as the tensor that a kernel sees; without dimensions it is a scalar."""
    kind = tl.block_type(dtype, list(data.shape)) if data.ndim else dtype
    return tl.tensor(upstream.TensorHandle(np.atleast_1d(data), dtype), kind)


def _neighbours(data: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.moveaxis(data, axis, 0)
    return np.moveaxis(rows[0::2], 0, axis), np.moveaxis(rows[1::2], 0, axis)


def _reduce(
    operation: upstream.ReduceOps, operands: list[tl.tensor], tree: Callable[[list[np.ndarray], int], list[np.ndarray]]
) -> list[tl.tensor]:
    """Apply `tree(storage, axis)`, which leaves extent 1 on the axis, and give the results the shape asked for."""
    data = [operand.handle.data for operand in operands]
    ndim, axis = data[0].ndim, operation.axis
    if axis is None:
        data, axis = [array.reshape(-1) for array in data], 0
    data = [array.squeeze(axis) for array in tree(data, axis)]
    if operation.keep_dims:
        data = [array.reshape((1,) * ndim) if operation.axis is None else np.expand_dims(array, axis) for array in data]
    return [_wrap(array, operand.dtype) for array, operand in zip(data, operands, strict=True)]


@_repair
def negative_axes() -> None:
    """Upstream takes an axis counted from the end as it stands, and slices and indexes shapes with it."""
    apply_upstream = upstream.ReduceScanOpInterface.apply

    def apply(self: Any, input: Any) -> Any:
        axis = tl.core._unwrap_if_constexpr(self.axis)
        if axis is not None:
            axis = tl.core._wrap_axis(axis, len((input[0] if isinstance(input, tuple) else input).shape))
        self.axis = axis
        return apply_upstream(self, input)

    upstream.ReduceScanOpInterface.apply = apply


@_repair
def narrow_sums() -> None:
    """Upstream adds the bit patterns of bfloat16, and accumulates fp16 in float32. The GPU rounds every partial sum."""
    sum_upstream = upstream.ReduceOps.sum
    scan_upstream = {np.cumsum: upstream.ScanOps.cumsum, np.cumprod: upstream.ScanOps.cumprod}

    def sum(self: Any, input: tl.tensor) -> tl.tensor:
        name = input.dtype.name
        if name not in _NARROW:
            return sum_upstream(self, input)

        def tree(data: list[np.ndarray], axis: int) -> list[np.ndarray]:
            (total,) = data
            while total.shape[axis] > 1:
                left, right = _neighbours(_widen(total, name), axis)
                total = _narrow(left + right, name)
            return [total]

        return _reduce(self, [input], tree)[0]

    def scan(ufunc: np.ufunc, whole: Any) -> Callable[[Any, tl.tensor], list[tl.tensor]]:
        def cumulate(self: Any, input: tl.tensor) -> list[tl.tensor]:
            name = input.dtype.name
            if name not in _NARROW:
                return scan_upstream[whole](self, input)
            data = np.moveaxis(input.handle.data, self.axis, 0).copy()
            for row in range(1, len(data)):
                data[row] = _narrow(ufunc(_widen(data[row - 1], name), _widen(data[row], name)), name)
            return [_wrap(np.moveaxis(data, 0, self.axis), input.dtype)]

        return cumulate

    upstream.ReduceOps.sum = sum
    upstream.ScanOps.cumsum = scan(np.add, np.cumsum)
    upstream.ScanOps.cumprod = scan(np.multiply, np.cumprod)


@_repair
def extremes() -> None:
    """Upstream finds minima and maxima by position alone, by the bits of bfloat16, and with NaN on top.

    It ignores the indices that come with the values. With NaN among them, what argmax returns depends on the GPU's
    order of reduction, so the combine function itself has to be run (see `block_combine`).
    """
    apply_upstream = upstream.ReduceOps.apply_impl
    standard = tl.standard
    plain = {standard._elementwise_max: np.fmax, standard._elementwise_min: np.fmin}
    indexed = {
        standard._argmax_combine_tie_break_left: np.max,
        standard._argmin_combine_tie_break_left: np.min,
    }

    def apply_impl(self: Any, input: tuple[tl.tensor, ...]) -> Any:
        name = input[0].dtype.name

        def number(data: np.ndarray) -> np.ndarray:
            return _widen(data, name) if name in _NARROW else data

        def reduce_plain(data: list[np.ndarray], axis: int) -> list[np.ndarray]:
            best = plain[self.combine_fn].reduce(number(data[0]), axis=axis, keepdims=True)
            return [_narrow(best, name) if name in _NARROW else best]

        def reduce_indexed(data: list[np.ndarray], axis: int) -> list[np.ndarray]:
            values, indices = number(data[0]), data[1]
            best = indexed[self.combine_fn](values, axis=axis, keepdims=True)
            unmatched = np.iinfo(indices.dtype).max
            index = np.where(values == best, indices, unmatched).min(axis=axis, keepdims=True)
            return [_narrow(best, name) if name in _NARROW else best, index]

        if self.combine_fn in plain:
            return _reduce(self, list(input), reduce_plain)
        if self.combine_fn in indexed:
            values = number(input[0].handle.data)
            if values.dtype.kind == "f" and np.isnan(values).any():
                return self.generic_reduce(input)
            return _reduce(self, list(input), reduce_indexed)
        return apply_upstream(self, input)

    upstream.ReduceOps.apply_impl = apply_impl


class _BlockConditionError(ValueError):
    """A kernel branches on a block, which has more than one truth value."""


@_repair
def block_combine() -> None:
    """Upstream calls the combine function once per element, on scalars.

    `tl.sort` of 64 numbers takes hundreds of calls. Whole blocks give the same, unless the function branches on its
    arguments.
    """
    reduce_upstream, scan_upstream = upstream.ReduceOps.generic_reduce, upstream.ScanOps.generic_scan
    bitwise = {tl.standard._xor_combine: np.bitwise_xor, tl.standard._or_combine: np.bitwise_or}

    def combine(
        function: Any, dtypes: list[tl.dtype], left: list[np.ndarray], right: list[np.ndarray]
    ) -> list[np.ndarray]:
        if function in bitwise:
            return [bitwise[function](left[0], right[0])]
        semantic = upstream.interpreter_semantic
        blocks = [_wrap(array, dtype) for array, dtype in zip(left + right, dtypes * 2, strict=True)]
        result = function(*blocks)
        result = result if isinstance(result, tuple) else (result,)
        return [
            np.broadcast_to(semantic.cast(semantic.to_tensor(value), dtype).handle.data, left[0].shape)
            for value, dtype in zip(result, dtypes, strict=True)
        ]

    def generic_reduce(self: Any, input: tuple[tl.tensor, ...]) -> list[tl.tensor]:
        dtypes = [operand.dtype for operand in input]

        def tree(data: list[np.ndarray], axis: int) -> list[np.ndarray]:
            while data[0].shape[axis] > 1:
                pairs = [_neighbours(array, axis) for array in data]
                data = combine(self.combine_fn, dtypes, [left for left, _ in pairs], [right for _, right in pairs])
            return data

        try:
            return _reduce(self, list(input), tree)
        except _BlockConditionError:
            return reduce_upstream(self, input)

    def generic_scan(self: Any, input: tuple[tl.tensor, ...]) -> list[tl.tensor]:
        dtypes = [operand.dtype for operand in input]
        data = [np.moveaxis(operand.handle.data, self.axis, 0) for operand in input]
        distance, size = 1, len(data[0])
        try:
            while distance < size:
                # Rows before `distance` have nothing to look back to; they are combined with any row and discarded.
                looked_back = combine(self.combine_fn, dtypes, [np.roll(array, distance, 0) for array in data], data)
                data = [np.concatenate([a[:distance], b[distance:]]) for a, b in zip(data, looked_back, strict=True)]
                distance *= 2
        except _BlockConditionError:
            return scan_upstream(self, input)
        return [_wrap(np.moveaxis(array, 0, self.axis), dtype) for array, dtype in zip(data, dtypes, strict=True)]

    upstream.ReduceOps.generic_reduce = generic_reduce
    upstream.ScanOps.generic_scan = generic_scan


@_repair
def histogram() -> None:
    """Upstream counts a value equal to `num_bins` into the last bin.

    What the GPU does with values outside the bins is undefined (it drops some and miscounts others), so they are an
    error here.
    """

    def create_histogram(self: Any, data: Any, bins: int, mask: Any) -> Any:
        values = data.data if mask is None else data.data[mask.data]
        if values.size and not (values.min() >= 0 and values.max() < bins):
            raise ValueError(f"tl.histogram of values outside [0, {bins}) is undefined on the GPU; mask them out")
        return upstream.TensorHandle(np.bincount(values, minlength=bins).astype(np.int32), tl.int32)

    upstream.InterpreterBuilder.create_histogram = create_histogram


# --- What a kernel may say ------------------------------------------------------------------------------------------


@_repair
def scalar_index() -> None:
    """Upstream takes `int()` of an array with one element, which numpy 2.4 refuses.

    So `range(n)` fails in every kernel.
    """
    patch_upstream = upstream._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_upstream(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    upstream._patch_lang_tensor = patch_lang_tensor


@_repair
def scalar_arguments() -> None:
    """Upstream passes float arguments as Python numbers, refuses booleans and narrows large integers.

    A Python number takes no part in type promotion: `x * scale` stays bfloat16 where compiled code has float32.
    Integers from 2**31 on become uint32, though labelled int64.
    """
    convert_upstream = upstream._implicit_cvt

    def implicit_cvt(arg: Any) -> Any:
        if not isinstance(arg, (bool, int, float)):
            return convert_upstream(arg)
        dtype = tl.str_to_ty(triton.runtime.jit.mangle_type(arg), None)
        return _wrap(np.array(arg, dtype=upstream._get_np_dtype(dtype)), dtype)

    upstream._implicit_cvt = implicit_cvt


def _logical(is_and: bool, *operands: Callable[[], Any]) -> Any:
    """`and` or `or` as the compiler has it: constants short-circuit, tensors combine element by element."""
    result = value = None
    for operand in operands:
        value = operand()
        if isinstance(value, tl.tensor):
            if result is not None:
                value = result.logical_and(value) if is_and else result.logical_or(value)
            result = value
        elif bool(value) is not is_and:
            return value
    return value if result is None else result


def _not(value: Any) -> Any:
    return value.__not__() if isinstance(value, tl.tensor) else not value


def _condition(value: Any) -> Any:
    if isinstance(value, tl.tensor) and value.handle.data.size > 1:
        raise _BlockConditionError("a condition must be a scalar; use tl.where to choose element by element")
    return value


_LOGIC = (_logical, _not, _condition)


@_repair
def block_logic() -> None:
    """Upstream leaves `and`, `or`, `not` and `if` to Python, for which every block is true.

    So `a < b and c < d` is just `c < d`. Compiled, the operators work element by element (without short-circuit),
    and `if` on a block is refused.
    """

    def call(function: Callable[..., Any], *arguments: ast.expr) -> ast.Call:
        name = ast.Name(id=f"_moegate{function.__name__}", ctx=ast.Load())
        return ast.Call(func=name, args=list(arguments), keywords=[])

    def thunk(expression: ast.expr) -> ast.Lambda:
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        return ast.Lambda(args=nothing, body=expression)

    class Transformer(upstream.ASTTransformer):
        def visit_Assign(self, node: ast.Assign) -> ast.AST:
            node.value = self.visit(node.value)
            return super().visit_Assign(node)

        def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
            self.generic_visit(node)
            return call(_logical, ast.Constant(isinstance(node.op, ast.And)), *map(thunk, node.values))

        def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
            self.generic_visit(node)
            return call(_not, node.operand) if isinstance(node.op, ast.Not) else node

        def visit_If(self, node: Any) -> ast.AST:
            self.generic_visit(node)
            node.test = call(_condition, node.test)
            return node

        visit_While = visit_IfExp = visit_If  # noqa: N815

    upstream.FunctionRewriter.ast_transformer = Transformer()
    for function in _LOGIC:
        setattr(upstream, f"_moegate{function.__name__}", function)  # from where it goes into a kernel's globals


@_repair
def kernel_namespace() -> None:
    """Upstream copies all its own globals into the module of every kernel.

    A kernel that uses an undefined name (`np`, `partial`, `math`) then runs here and fails to compile.
    """

    def compile_and_exec(self: Any, transformed_ast: ast.AST) -> Any:
        return define(self.fn, compile(transformed_ast, filename=self.filename, mode="exec"), self.kwargs)

    upstream.FunctionRewriter._compile_and_exec = compile_and_exec


def define(function: Any, code: CodeType, settings: Mapping[str, Any]) -> Any:
    """A kernel as it runs here.

    Args:
        function: as it was written.
        code: of the module that defines it, rewritten.
        settings: of its rewriter.
    """
    namespace, names = dict(settings), function.__globals__
    names["interpreter_semantic"] = upstream.interpreter_semantic
    names.update({f"_moegate{own.__name__}": own for own in _LOGIC})
    exec(code, names, namespace)
    return namespace[function.__name__]


@_repair
def nan_padding() -> None:
    """Upstream pads a bfloat16 block of a descriptor or block pointer with zeros where NaN is asked for."""
    builder, nan = upstream.InterpreterBuilder, upstream._ir.PADDING_OPTION.PAD_NAN
    descriptor_upstream, pointer_upstream = builder.create_descriptor_load, builder.create_tensor_pointer_load

    def load(self: Any, pointers: Any, masks: np.ndarray) -> Any:
        other = upstream.TensorHandle(np.full(masks.shape, 0x7FFF, dtype=np.uint16), tl.bfloat16)
        return self.create_masked_load(pointers, upstream.TensorHandle(masks, tl.int1), other, None, None, False)

    def create_descriptor_load(self: Any, desc: Any, indices: Any, *rest: Any) -> Any:
        if desc.padding != nan or desc.base.get_element_ty().name != "bf16":
            return descriptor_upstream(self, desc, indices, *rest)
        return load(self, *desc.materialize_pointers(indices))

    def create_tensor_pointer_load(self: Any, ptr: Any, boundary_check: Any, padding_option: Any, *rest: Any) -> Any:
        if padding_option != nan or ptr.base.get_element_ty().name != "bf16":
            return pointer_upstream(self, ptr, boundary_check, padding_option, *rest)
        return load(self, *ptr.materialize_pointers(boundary_check))

    builder.create_descriptor_load = create_descriptor_load
    builder.create_tensor_pointer_load = create_tensor_pointer_load


_LIBDEVICE = {
    "tanh": np.tanh,
    "expm1": np.expm1,
    "log1p": np.log1p,
    "pow": np.power,
    "rint": np.rint,
    "nearbyint": np.rint,
    "trunc": np.trunc,
}


@_repair
def gpu_only_functions() -> None:
    """Upstream has neither programmatic dependent launch, which a sequential interpreter may ignore, nor libdevice."""

    def nothing() -> None:
        pass

    def elementwise(function: Callable[..., np.ndarray]) -> Callable[..., tl.tensor]:
        def call(*arguments: Any) -> tl.tensor:
            semantic = upstream.interpreter_semantic
            operands = list(semantic.broadcast_tensors(*(semantic.to_tensor(argument) for argument in arguments)))
            for operand in operands:
                if operand.dtype.name not in ("fp32", "fp64"):
                    raise TypeError(f"libdevice takes fp32 and fp64, not {operand.dtype}")
            result = function(*(operand.handle.data for operand in operands))
            return tl.tensor(upstream.TensorHandle(result, operands[0].dtype), operands[0].type)

        return call

    from triton.language.extra import cuda, libdevice

    cuda.gdc_wait = cuda.gdc_launch_dependents = nothing
    for name, function in _LIBDEVICE.items():
        setattr(libdevice, name, elementwise(function))
        setattr(cuda.libdevice, name, elementwise(function))


# --- Speed ----------------------------------------------------------------------------------------------------------


class _NothingToRestore:
    def restore(self) -> None:
        pass


@_repair
def patch_once() -> None:
    """Upstream patches all of triton.language at every launch and every call between jitted functions.

    It takes the patches back after the launch. A process has one Triton mode, so once is enough.
    """
    wrapper_code = tl.core.load.__code__  # what `@builtin` wraps a function in, to demand the argument `_semantic`
    semantic = upstream.interpreter_semantic

    def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = member.__wrapped__ if getattr(member, "__code__", None) is wrapper_code else member

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    upstream._patch_attr = patch_attr
    upstream._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    upstream._patch_lang = lambda fn: _NothingToRestore()
    upstream.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


@_repair
def no_overflow_checks() -> None:
    """Upstream repeats every integer operation in 64 bits for an overflow check that is off unless debugging is on."""
    builder = upstream.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@_repair
def no_host_copies() -> None:
    """Upstream copies the whole storage of every tensor argument onto itself after a launch, when it is on the CPU."""
    init_upstream, restore_upstream = upstream.GridExecutor._init_args_hst, upstream.GridExecutor._restore_args_dev

    def on_host(arg: Any) -> bool:
        if isinstance(arg, tuple):
            return all(map(on_host, arg))
        if isinstance(arg, upstream.TensorDescriptor):
            return on_host(arg.base)
        return not hasattr(arg, "data_ptr") or upstream._unwrap_tensor(arg).device.type == "cpu"

    def init_args_hst(self: Any, args_dev: Any, kwargs: Any) -> Any:
        if on_host(tuple(args_dev)) and on_host(tuple(kwargs.values())):
            return args_dev, kwargs
        return init_upstream(self, args_dev, kwargs)

    def restore_args_dev(self: Any, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        if args_hst is not args_dev:
            restore_upstream(self, args_dev, args_hst, kwargs, kwargs_hst)

    upstream.GridExecutor._init_args_hst = init_args_hst
    upstream.GridExecutor._restore_args_dev = restore_args_dev


@_repair
def no_float_warnings() -> None:
    """Upstream lets numpy warn of overflow, division by zero and NaN, which on a GPU are values like any other."""
    call_upstream = upstream.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):
            call_upstream(self, *args, **kwargs)

    upstream.GridExecutor.__call__ = call


class _Lazy:
    """An attribute computed at its first use; an instance's own value comes before it."""

    def __init__(self, name: str, compute: Callable[[Any], Any]) -> None:
        self.name, self.compute = name, compute

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.compute(instance)
        return value


@_repair
def shared_types() -> None:
    """Upstream builds the type of every intermediate result anew.

    Its shape is a tuple of constants, each with a type of its own, and its name a string of both. There are few
    shapes, and hardly anybody asks for the types of constants.
    """
    core = tl.core
    constexpr, triton_tuple, block_type = core.constexpr, core.tuple, core.block_type
    yes, no = constexpr(True), constexpr(False)

    def constexpr_init(self: Any, value: Any) -> None:
        while isinstance(value, constexpr):
            value = value.value
        self.value = value

    def tuple_init(self: Any, args: Any, type: Any = None) -> None:
        self.values = list(args)
        if type is not None:
            self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)

    def tuple_eq(self: Any, other: Any) -> Any:
        if self is other:
            return yes
        other = core._unwrap_if_constexpr(other)
        return yes if isinstance(other, (list, tuple, triton_tuple)) and self.values == list(other) else no

    constexpr.__init__, triton_tuple.__init__, triton_tuple.__eq__ = constexpr_init, tuple_init, tuple_eq
    constexpr.type = _Lazy("type", lambda self: core.constexpr_type(self.value))
    triton_tuple.type = _Lazy("type", lambda self: core._type_for_tuple_values(self.values))

    def constants(block: Any) -> tuple[Any, Any]:
        """What a tensor of this type has as `shape` and `numel`."""
        return triton_tuple([constexpr(extent) for extent in block.shape]), constexpr(block.numel)

    shapes: dict[tuple[int, ...], dict[str, Any]] = {}
    block_init_upstream = block_type.__init__

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([extent.value if isinstance(extent, constexpr) else extent for extent in shape])
        known = shapes.get(key)
        if known is None:
            block_init_upstream(self, element_ty, shape)
            known = shapes[key] = {"shape": self.shape, "numel": self.numel, "constants": constants(self)}
        self.__dict__.update(known)
        self.element_ty = element_ty

    def block_eq(self: Any, other: Any) -> bool:
        if not isinstance(other, block_type) or self.element_ty != other.element_ty:
            return False
        return self.shape is other.shape or bool(self.shape == other.shape)

    block_type.__init__, block_type.__eq__ = block_init, block_eq
    block_type.name = _Lazy("name", lambda self: f"<{self.shape}, {self.element_ty}>")
    block_type.constants = _Lazy("constants", constants)  # for types made before these repairs

    scalar = (triton_tuple([]), constexpr(1))

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.constants if type.is_block() else scalar

    core.tensor.__init__ = tensor_init

    pointer = np.dtype(np.uint64)
    numpy_dtypes: dict[str, np.dtype] = {}
    get_np_dtype_upstream = upstream._get_np_dtype

    def get_np_dtype(type: Any) -> np.dtype:
        element = type.scalar
        if element.is_ptr():
            return pointer
        known = numpy_dtypes.get(element.name)
        if known is None:
            known = numpy_dtypes[element.name] = get_np_dtype_upstream(element)
        return known

    upstream._get_np_dtype = get_np_dtype


@_repair
def equal_operands() -> None:
    """Upstream works out promotion and broadcast of two operands even where type and shape are already the same."""
    semantic, tensor = TritonSemantic, tl.core.tensor
    check_upstream, broadcast_upstream = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    promoted_by_division = (tl.float16, tl.bfloat16)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left is right or (left.is_block() and right.is_block() and left.shape is right.shape):
            return lhs, rhs
        return broadcast_upstream(self, lhs, rhs)

    def binary_op_type_checking_impl(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        if isinstance(lhs, tensor) and isinstance(rhs, tensor):
            dtype = lhs.dtype
            if dtype is rhs.dtype and not dtype.is_ptr() and not (div_or_mod and dtype in promoted_by_division):
                return broadcast_impl_value(self, lhs, rhs)
        return check_upstream(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    semantic.broadcast_impl_value = broadcast_impl_value
    semantic.binary_op_type_checking_impl = binary_op_type_checking_impl


@_repair
def plain_values() -> None:
    """Upstream asks of every value four times whether it is of a kind that is to be unwrapped; hardly any is."""
    core = tl.core
    constexpr, dtype = core.constexpr, core.dtype
    plain = frozenset((core.tensor, dtype, core.block_type, core.pointer_type, int, float, bool, str, type(None)))
    unwrap_upstream, dtype_eq_upstream = core._unwrap_if_constexpr, dtype.__eq__

    def unwrap_if_constexpr(o: Any) -> Any:
        kind = type(o)
        if kind in plain:
            return o
        return o.value if kind is constexpr else unwrap_upstream(o)

    def dtype_eq(self: Any, other: Any) -> bool:
        return self is other or dtype_eq_upstream(self, other)

    core._unwrap_if_constexpr, dtype.__eq__ = unwrap_if_constexpr, dtype_eq


@_repair
def unmeasured_handles() -> None:
    """Upstream measures the array of every intermediate result against its type, which its own builder gave it."""

    def handle_init(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr

    upstream.TensorHandle.__init__ = handle_init


# --- Memory ---------------------------------------------------------------------------------------------------------

_memory: Memory | None = None  # of the launch that runs


@_repair
def memory_bounds() -> None:
    """Upstream reads and writes wherever a pointer points, so a kernel's mistake corrupts the process or goes unseen.

    Here it is an `OutOfBoundsError` (`bounds.py`), raised before anything is touched. Masked lanes touch nothing.
    """
    builder, executor = upstream.InterpreterBuilder, upstream.GridExecutor

    load_upstream, store_upstream = builder.create_masked_load, builder.create_masked_store
    rmw_upstream, cas_upstream = builder.create_atomic_rmw, builder.create_atomic_cas
    int_to_ptr_upstream = builder.create_int_to_ptr

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        if _memory is not None:
            # What a descriptor masks with is an array, whose `data` is a buffer.
            lanes = mask if isinstance(mask, np.ndarray) else mask.data
            _memory.check("reads", ptrs.data, lanes, upstream._get_np_dtype(ptrs.get_element_ty()).itemsize)
        return load_upstream(self, ptrs, mask, *rest, **named)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if _memory is not None:
            lanes = mask if isinstance(mask, np.ndarray) else mask.data
            _memory.check("writes", ptrs.data, lanes, value.data.itemsize)
        return store_upstream(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self: Any, operation: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        if _memory is not None:
            _memory.check("updates", ptr.data, mask.data, val.data.itemsize)
        return rmw_upstream(self, operation, ptr, val, mask, *rest)

    def create_atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, *rest: Any) -> Any:
        if _memory is not None:
            _memory.check("updates", ptr.data, None, val.data.itemsize)
        return cas_upstream(self, ptr, cmp, val, *rest)

    def create_int_to_ptr(self: Any, *arguments: Any) -> Any:
        if _memory is not None:
            _memory.is_whole = False
        return int_to_ptr_upstream(self, *arguments)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas
    builder.create_int_to_ptr = create_int_to_ptr
    init_upstream, call_upstream = executor._init_args_hst, executor.__call__

    def init_args_hst(self: Any, args_dev: Any, kwargs: Any) -> Any:
        global _memory
        args_hst, kwargs_hst = init_upstream(self, args_dev, kwargs)
        _memory = Memory(self.fn.__name__, dict(arguments_of(self.arg_names, args_hst, kwargs_hst)))
        return args_hst, kwargs_hst

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _memory
        before = _memory
        try:
            call_upstream(self, *args, **kwargs)
        except upstream.InterpreterError as error:
            cause = cause_of(error)
            if cause is None:
                raise
            raise cause from None
        finally:
            _memory = before

    executor._init_args_hst, executor.__call__ = init_args_hst, call
