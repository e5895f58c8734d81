"""Arguments are checked before anything is launched, and an error names the argument, what was expected and what came.

Shapes, dtypes, devices and layouts are host knowledge and always checked. What only the device knows (ids in range,
NaN in weights) would stall its queue to ask for: those checks run inside `debug_checks()` or with `MOEGATE_DEBUG=1`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch

from .config import Activation, ActivationFunction

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# What lists every expert is refused beyond this many, before it takes the memory.
MOST_LISTED = 1 << 20

DEBUG_VARIABLE = "MOEGATE_DEBUG"
_ON, _OFF = ("1", "true", "on", "yes"), ("", "0", "false", "off", "no")


def switch(variable: str, environment: Mapping[str, str]) -> bool:
    """Whether an environment variable is on; one that is not set is off.

    Raises:
        ValueError: neither on nor off.
    """
    text = environment.get(variable, "").strip().lower()
    if text not in (*_ON, *_OFF):
        raise ValueError(f"{variable}: expected one of {[*_ON, *_OFF]}, got {text!a:.80}")
    return text in _ON


_is_asked_for = switch(DEBUG_VARIABLE, os.environ)
_debug: ContextVar[bool] = ContextVar("moegate_debug", default=_is_asked_for)


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Turn the checks that synchronise the device on (or off) inside this block.

    Raises:
        TypeError: `enabled` is no bool.
    """
    token = _debug.set(expect_bool("enabled", enabled))
    try:
        yield
    finally:
        _debug.reset(token)


def debugging() -> bool:
    """Whether checks that synchronise the device are on."""
    return _debug.get()


def expect_tensor(
    name: str,
    value: Any,
    *,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] | None = None,
    like: torch.Tensor | None = None,
    contiguous: bool = False,
) -> torch.Tensor:
    """Check one tensor.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
        shape: the expected shape; a string (`"M"`) is a dimension of any size, an int is exact.
        dtypes: the accepted dtypes; None accepts any.
        like: the tensor whose device it must share.
        contiguous: whether the whole tensor must be contiguous, and not the last dimension alone.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another rank, shape, device or layout.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    sizes = value.shape
    if len(sizes) != len(shape):
        raise ValueError(f"{name}: expected shape {_wanted(shape)}, got {len(sizes)} dimensions {list(sizes)}")
    for want, got in zip(shape, sizes, strict=True):
        if want != got and not isinstance(want, str):
            raise ValueError(f"{name}: expected shape {_wanted(shape)}, got {list(sizes)}")
    if dtypes is not None and value.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name}: expected a strided tensor, got layout {value.layout}")
    if sizes and sizes[-1] > 1 and value.stride(-1) != 1 and value.numel():
        raise ValueError(f"{name}: expected a contiguous last dimension, got strides {list(value.stride())}")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(value.stride())}")
    return value


def _wanted(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def expect_int(name: str, value: Any, *, low: int, high: int | None = None) -> int:
    """Check an integer in [low, high].

    Raises:
        TypeError: not an int (a bool is not one).
        ValueError: outside the range.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"a number in [{low}, {high}]"
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return value


def expect_bool(name: str, value: Any) -> bool:
    """Check a bool.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__} {value!r}")
    return value


def shown(value: Any) -> str:
    """A value's type and its beginning, for a message: escaped, so that no terminal obeys it."""
    return f"{type(value).__name__} {value!a:.80}"


def expect_instance(name: str, value: Any, kind: type, *, optional: bool = False) -> Any:
    """Check an object's class; None is right where it is optional.

    Raises:
        TypeError: anything else.
    """
    if not (isinstance(value, kind) or (optional and value is None)):
        wanted = f"{kind.__name__} or None" if optional else kind.__name__
        raise TypeError(f"{name}: expected {wanted}, got {shown(value)}")
    return value


def expect_one_of(name: str, value: Any, known: Iterable[str]) -> Any:
    """Check a name.

    Raises:
        ValueError: another one, with those that exist.
    """
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name}: expected one of {[str(each) for each in known]}, got {value!a:.80}")
    return value


def expect_number(name: str, value: Any, *, above: float = -math.inf) -> float:
    """Check a finite number, above another one where that is given.

    Raises:
        TypeError: no number (a bool is none).
        ValueError: NaN, an infinity, or not above.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a float, got {shown(value)}")
    if not (math.isfinite(value) and value > above):
        wanted = "a finite number" + ("" if above == -math.inf else f" above {above:g}")
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return value


def expect_dtype(name: str, value: Any, *, optional: bool = False) -> Any:
    """Check a dtype of activations: bfloat16, float16 or float32.

    Raises:
        TypeError: anything else.
    """
    if value not in FLOATS and not (optional and value is None):
        known = [str(dtype) for dtype in FLOATS]
        raise TypeError(f"{name}: expected one of {known}{' or None' if optional else ''}, got {value!a:.80}")
    return value


def expect_device(name: str, value: Any) -> torch.device:
    """Check a device, given as one or by its name.

    Raises:
        TypeError: neither.
        ValueError: a name that torch does not know.
    """
    if isinstance(value, torch.device):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a torch.device or its name, got {shown(value)}")
    try:
        return torch.device(value)
    except RuntimeError:
        raise ValueError(f"{name}: expected a torch.device or its name, got {value!a:.80}") from None


def expect_activation(activation: Any, alpha: Any, limit: Any, interleaved: Any) -> ActivationFunction:
    """Check an activation, given as one or by its name, and its parameters.

    Raises:
        TypeError: a parameter that is no number, or `interleaved` that is no bool.
        ValueError: no activation, with the names that exist; swigluoai's parameters for another one, or not positive
            and finite; rows that alternate for an activation without a gate.
    """
    try:
        return _activation(activation, alpha, limit, interleaved)
    except TypeError:
        pass  # an argument that cannot be remembered is none that is right: the check below says which
    return _activation.__wrapped__(activation, alpha, limit, interleaved)


@lru_cache(maxsize=256, typed=True)
def _activation(activation: Any, alpha: Any, limit: Any, interleaved: Any) -> ActivationFunction:
    if not isinstance(activation, str) or activation not in set(Activation):
        raise ValueError(f"activation: expected one of {[str(known) for known in Activation]}, got {activation!r}")
    kind = Activation(activation)
    for name, value, default in (
        ("swiglu_alpha", alpha, ActivationFunction.alpha),
        ("swiglu_limit", limit, ActivationFunction.limit),
    ):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if kind is not Activation.SWIGLUOAI and value != default:
            raise ValueError(
                f"{name}: expected {default} for the activation {kind}, which has no such parameter, got {value}"
            )
    expect_bool("interleaved", interleaved)
    if interleaved and not kind.is_gated:
        raise ValueError(f"interleaved: expected False for the activation {kind}, which has no gate, got True")
    return ActivationFunction(kind, float(alpha), float(limit), interleaved)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes from a tensor's first element to behind its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def expect_apart(name: str, out: torch.Tensor, **inputs: torch.Tensor | None) -> None:
    """Check that a tensor to write into has rows apart from each other and from the inputs.

    Raises:
        ValueError: rows that share memory, or an input that does, by name.
    """
    if out.numel() == 0:
        return
    extent = out.shape[-1]
    for stride, size in sorted(zip(out.stride()[:-1], out.shape[:-1], strict=True)):
        if size > 1:
            if stride < extent:
                raise ValueError(f"{name}: expected rows that do not overlap, got strides {list(out.stride())}")
            extent += (size - 1) * stride
    start, end = _span(out)
    for other, tensor in inputs.items():
        if tensor is None or tensor.numel() == 0 or tensor.device != out.device:
            continue
        other_start, other_end = _span(tensor)
        if start < other_end and other_start < end:
            raise ValueError(f"{name}: expected memory apart from the inputs, got an overlap with {other}")


def debug_expect_ids(name: str, ids: torch.Tensor, num_experts: int) -> None:
    """In debug mode, check that every id is in [-1, num_experts).

    Raises:
        ValueError: an id outside the range, with the first one found.
    """
    if debugging() and ids.numel():
        bad = (ids < -1) | (ids >= num_experts)
        if bool(bad.any()):
            raise ValueError(f"{name}: expected ids in [-1, {num_experts}), got {int(ids[bad][0])}")


def debug_expect_no_nan(name: str, value: torch.Tensor) -> None:
    """In debug mode, check that a tensor holds no NaN.

    Raises:
        ValueError: a NaN, with how many there are.
    """
    if debugging() and value.numel():
        count = int(torch.isnan(value).sum())
        if count:
            raise ValueError(f"{name}: expected no NaN, got {count} of {value.numel()}")


def debug_expect_expert_map(name: str, expert_map: torch.Tensor, num_local_experts: int) -> None:
    """In debug mode, check that a map's values are in [-1, num_local_experts) and that no local expert comes twice.

    Raises:
        ValueError: a value outside the range, or one that comes twice, with the first one found.
    """
    if debugging() and expert_map.numel():
        bad = (expert_map < -1) | (expert_map >= num_local_experts)
        if bool(bad.any()):
            raise ValueError(f"{name}: expected local ids in [-1, {num_local_experts}), got {int(expert_map[bad][0])}")
        ids, counts = torch.unique(expert_map[expert_map >= 0], return_counts=True)
        if bool((counts > 1).any()):
            raise ValueError(f"{name}: expected each local id once, got {int(ids[counts > 1][0])} twice")


def debug_expect_counts(name: str, counts: torch.Tensor, most: int) -> None:
    """In debug mode, check that every count is in [0, most].

    Raises:
        ValueError: a count outside the range, with the first one found.
    """
    if debugging() and counts.numel():
        bad = (counts < 0) | (counts > most)
        if bool(bad.any()):
            raise ValueError(f"{name}: expected counts in [0, {most}], got {int(counts[bad][0])}")
