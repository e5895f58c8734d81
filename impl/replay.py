"""A call's launches, recorded once and replayed: for a call of the same form nothing is checked or decided again.

What a call of `fused_experts` or `select_experts` launches follows from its *form*: dtype, shape, strides, device and
alignment of every tensor, every other argument, and what is in force around it. So the second call of a form is
recorded, and each further one takes memory, puts today's addresses into the recorded arguments, and launches. Only
addresses are new in a replay and none is kept: a weight that was moved or freed leaves nothing behind.

A call is replayed only if all it did was to take memory and launch kernels on that and on its own tensors, which a
dispatch mode watches; where it did anything else it runs as it stands, and its path record says why.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton import knobs
from triton.runtime import driver

from . import path
from .checks import debugging, expect_int, switch
from .kernels.device import current_device
from .quantization import ExpertsQuantization

VARIABLE = "MOEGATE_REPLAY"
# A form that comes once, as an uneven batch does, would cost a recording for nothing.
AFTER = 1
_MOST_FORMS = 4096
_ALIGNMENT = 256  # of parts of the scratch memory, as torch's allocator aligns tensors (Triton asks for 16)
# Of other classes a tensor may be anything.
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_CONSTANTS = frozenset({type(None), bool, int, float, str})
_LAUNCH = path.launch
_PASSED = (Tensor, int, float, str, type(None))

Form = tuple[Any, ...]
Result = Tensor | tuple[Tensor, ...]
Function = TypeVar("Function", bound=Callable[..., Any])
Answer = TypeVar("Answer", bound=Result)

# Nobody said whether calls are replayed.
_UNSAID = -1


def _said() -> int | None:
    if switch(VARIABLE, os.environ):
        return AFTER
    return None if os.environ.get(VARIABLE, "").strip() else _UNSAID


_is_asked_for = _said()
_in_force: ContextVar[int | None] = ContextVar("moegate_replay", default=_is_asked_for)
# By form: how often it was seen, its plan, or why it has none.
_forms: dict[Form, int | Plan | str] = {}


@contextmanager
def replaying(after: int | None = AFTER) -> Iterator[None]:
    """In this block calls are replayed once a form was seen more than `after` times; with None none is.

    Raises:
        TypeError, ValueError: no number of calls.
    """
    if after is not None:
        expect_int("after", after, low=0)
    token = _in_force.set(after)
    try:
        yield
    finally:
        _in_force.reset(token)


@contextmanager
def replaying_unless_said() -> Iterator[None]:
    """A block that would rather be replayed, as the device waits for the host in it; what was said elsewhere counts."""
    token = _in_force.set(AFTER) if _in_force.get() == _UNSAID else None
    try:
        yield
    finally:
        if token is not None:
            _in_force.reset(token)


def is_replaying() -> bool:
    """Whether calls are replayed here."""
    after = _in_force.get()
    return after is not None and after != _UNSAID and not debugging()


def may_launch_otherwise() -> bool:
    """Whether nobody here wants to see every launch as it stands, but for a path's record."""
    return is_replaying() and path.launch is _LAUNCH and not _is_profiled()


def forget() -> None:
    """Forget every form (tests; and where what decides on launches has changed)."""
    _forms.clear()


def replayable(around: Callable[[], tuple[Any, ...]]) -> Callable[[Function], Function]:
    """Let a function be replayed. It returns tensors, and may launch kernels and take memory.

    Args:
        around: gives what it depends on beside its arguments.
    """

    def decorated(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return replayed(
                lambda: (function.__name__, around(), *kwargs),
                (*args, *kwargs.values()),
                lambda: function(*args, **kwargs),
                by_default=False,
            )

        return call  # pyright: ignore[reportReturnType]

    return decorated


def replayed(
    around: Callable[[], tuple[Any, ...]], arguments: Sequence[Any], run: Callable[[], Answer], *, by_default: bool
) -> Answer:
    """Replay what `run` launches.

    Args:
        around: gives what it depends on beside the arguments, hashable; the first entry names who asks.
        arguments: tensors that it reads, a quantisation for its own, and constants; one at least is a tensor.
        run: returns tensors, and may launch kernels, take memory and call `path.operate`.
        by_default: also where nobody said whether calls are replayed.
    """
    after = _after(by_default=by_default)
    if after is None:
        return run()
    tensors: list[Tensor] = []
    try:
        parts = _form(arguments, tensors)
        form = (around(), tensors[0].device, *parts)
        known = _forms.get(form, 0)
    except (TypeError, AttributeError, RuntimeError, IndexError):
        return run()  # what has no form is no argument that is right, or one that changes
    if isinstance(known, Plan) and not _is_profiled():
        return cast(Answer, known.replay(tensors))
    if isinstance(known, int) and known >= after:
        recording = _Recording(tensors)
        with recording.listening():
            result = run()
        _keep(form, recording.plan(result))
        return result
    if isinstance(known, int):
        _keep(form, known + 1)
    elif isinstance(known, str):
        path.note("no_replay", known)
    return run()


def _after(*, by_default: bool) -> int | None:
    """After how many calls of a form the next ones are replayed; None: never."""
    after = _in_force.get()
    if after == _UNSAID:
        after = AFTER if by_default else None
    # Whoever put another launcher in its place (a tuner, the gate's own test) wants every launch.
    return None if debugging() or path.launch is not _LAUNCH else after


def _keep(form: Form, known: int | Plan | str) -> None:
    if len(_forms) >= _MOST_FORMS:
        _forms.clear()
    _forms[form] = known


def _is_profiled() -> bool:
    """Whether somebody listens to Triton's own launches, as its profiler does."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _form(values: Iterable[Any], tensors: list[Tensor]) -> list[Any]:
    """The form of arguments; their tensors are put to `tensors`, in order.

    Raises:
        TypeError, AttributeError, RuntimeError: an argument without one.
    """
    parts: list[Any] = []
    add = parts.append
    for value in values:
        kind = type(value)
        if kind in _TENSORS:
            tensors.append(value)
            add((value.dtype, value.shape, value.stride(), value.get_device(), value.data_ptr() & 15))
        elif kind in _CONSTANTS or isinstance(value, Enum):
            add(kind)  # True is 1, and is no number of ranks
            add(value)
        elif kind is ExpertsQuantization:
            add((kind, value.scheme, value.block_shape, value.per_act_token_quant))
            parts += _form(value.tensors().values(), tensors)
        else:
            raise TypeError(f"no form of {kind.__name__}")
    return parts


# --- Replaying ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """An argument that is an address.

    Attributes:
        position: among the launch's arguments.
        base: which memory: a number among the call's tensors, the scratch memory and the results.
        offset: bytes behind the base's start.
        view: (dtype, size, stride) of the tensor that stood there, for the interpreter.
    """

    position: int
    base: int
    offset: int
    view: tuple[torch.dtype, torch.Size, tuple[int, ...]]


class _Compiled:
    """A launch of a compiled kernel, past everything that Triton does to find it."""

    def __init__(self, compiled: Any, grid: Sequence[int], arguments: list[Any], slots: Sequence[Slot]) -> None:
        launcher, hooks = compiled.run, (compiled.packed_metadata, None, None, None)
        scratch = [getattr(launcher, name, None) for name in ("global_scratch_size", "profile_scratch_size")]
        if scratch == [0, 0] and hasattr(launcher, "launch_pdl"):
            # NVIDIA's launcher looks for scratch memory in Python before it does anything; here is none.
            self._run = launcher.launch
            flags = (launcher.launch_cooperative_grid, launcher.launch_pdl, None, None)
            self._tail = (compiled.function, *flags, *hooks)
        else:
            self._run, self._tail = launcher, (compiled.function, *hooks)
        self._grid = (*grid, 1, 1)[:3]
        self._arguments = arguments
        self._slots = tuple((slot.position, slot.base, slot.offset) for slot in slots)

    def __call__(self, addresses: list[int], memory: list[Tensor | None], stream: int) -> None:
        del memory
        arguments = self._arguments.copy()
        for position, base, offset in self._slots:
            arguments[position] = addresses[base] + offset
        self._run(*self._grid, stream, *self._tail, *arguments)


class _Interpreted:
    """A launch under Triton's interpreter, which takes tensors."""

    def __init__(
        self, kernel: Any, grid: Sequence[int], arguments: list[Any], meta: dict[str, Any], slots: Sequence[Slot]
    ) -> None:
        self._kernel, self._grid, self._arguments, self._meta, self._slots = kernel, grid, arguments, meta, slots

    def __call__(self, addresses: list[int], memory: list[Tensor | None], stream: int) -> None:
        del addresses, stream
        arguments = self._arguments.copy()
        for slot in self._slots:
            base = memory[slot.base]
            if base is None:
                raise AssertionError("an address of a tensor that is not there")
            dtype, size, stride = slot.view
            start = base.storage_offset() * base.element_size() + slot.offset
            view = torch.empty(0, dtype=dtype, device=base.device)
            arguments[slot.position] = view.set_(base.untyped_storage(), start // dtype.itemsize, size, stride)
        self._kernel[self._grid](*arguments, **self._meta)


class _Operation:
    """A library's operation, whose result stands behind all other memory, in the order in which they come."""

    def __init__(self, function: Callable[..., Tensor], bases: Sequence[int | None]) -> None:
        self._function, self._bases = function, tuple(bases)

    def __call__(self, addresses: list[int], memory: list[Tensor | None], stream: int) -> None:
        del stream
        result = self._function(*[None if base is None else memory[base] for base in self._bases])
        memory.append(result)
        addresses.append(result.data_ptr())


class Plan:
    """What a call of one form takes and launches.

    Args:
        device: of its tensors.
        scratch: bytes of memory that nobody sees.
        results: shape and dtype of each tensor that is returned.
        returns_one: a tensor, and not a tuple.
        launches: in order.
        heard: facts and launches for whoever listens.
    """

    __slots__ = ("_device", "_heard", "_index", "_launches", "_results", "_returns_one", "_scratch")

    def __init__(
        self,
        device: torch.device,
        scratch: int,
        results: Sequence[tuple[torch.Size, torch.dtype]],
        returns_one: bool,
        launches: Sequence[Any],
        heard: tuple[Sequence[tuple[str, Any]], Mapping[str, int]],
    ) -> None:
        self._device, self._scratch, self._results, self._returns_one = device, scratch, tuple(results), returns_one
        self._launches, self._heard = tuple(launches), heard
        self._index = -1 if device.index is None else device.index

    def replay(self, tensors: Sequence[Tensor]) -> Result:
        """Launch everything on these tensors' addresses."""
        device = self._device
        results = tuple([torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._results])
        scratch = torch.empty(self._scratch, dtype=torch.uint8, device=device) if self._scratch else None
        memory = [*tensors, scratch, *results]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in memory]
        listener = path.listener()
        if listener is not None:
            listener.add(*self._heard)
        with current_device(results[0]):
            stream = driver.active.get_current_stream(self._index) if self._index >= 0 else 0
            for launch in self._launches:
                launch(addresses, memory, stream)
        return results[0] if self._returns_one else results


# --- Recording ------------------------------------------------------------------------------------------------------


class _OtherError(Exception):
    """The call did something that a replay would not do; the message says what."""


class _Watch(TorchDispatchMode):
    """Keeps the memory that a call takes, so that no address comes twice, and notes what else it does."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Tensor] = []
        self.other = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.new_empty):
            self.taken.append(result)
        elif not (func.is_view or func.overloadpacket is torch.ops.aten.detach):
            self.other = self.other or f"the call runs {func}"
        return result


class _Recording(path.PathRecord):
    """What a call did.

    Args:
        tensors: of the call.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self._watch = _Watch()
        self._steps: list[Callable[[Mapping[int, int], Sequence[Tensor]], Any]] = []  # what makes each for a plan
        self._made: list[Tensor] = []  # by operations

    def launch(self, kernel: Any, grid: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Any:
        """Launch a kernel, and keep how; what Triton does for it is none of the call's doing."""
        with _disable_current_modes():
            compiled = super().launch(kernel, grid, args, meta)
        self._steps.append(partial(self._launch_of, kernel, grid, args, meta, compiled))
        return compiled

    def operate(self, function: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> Tensor:
        """Run a library's operation, and keep it; what it does inside is its own."""
        with _disable_current_modes():
            result = super().operate(function, tensors)
        self._steps.append(partial(self._operation_of, function, tensors))
        self._made.append(result)
        return result

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watch what is done in this block; whoever listened before hears of it afterwards."""
        before = path.listener()
        with path.record_path(self), self._watch, replaying(None):  # a replay within would keep its launches to itself
            yield
        if before is not None:
            before.add(self.facts, self.launches)

    def plan(self, result: Result) -> Plan | str:
        """The plan; a string says why there is none."""
        try:
            return self._plan(result)
        except _OtherError as reason:
            return str(reason)

    def _plan(self, result: Result) -> Plan:
        if self._watch.other:
            raise _OtherError(self._watch.other)
        returned = result if isinstance(result, tuple) else (result,)
        taken = {_storage(each): each.untyped_storage().nbytes() for each in self._watch.taken}
        for one in returned:
            if taken.pop(_storage(one), -1) != one.nbytes or not one.is_contiguous():
                raise _OtherError("the call returns memory that it did not take for that alone")
        scratch, starts = 0, {}
        for storage, size in taken.items():
            starts[storage] = scratch
            scratch += -(-size // _ALIGNMENT) * _ALIGNMENT
        launches = [step(starts, returned) for step in self._steps]
        return Plan(
            returned[0].device,
            scratch,
            [(one.shape, one.dtype) for one in returned],
            not isinstance(result, tuple),
            launches,
            (tuple(self.facts), Counter(self.launches)),
        )

    def _operation_of(
        self,
        function: Callable[..., Tensor],
        tensors: tuple[Tensor | None, ...],
        starts: Mapping[int, int],
        returned: Sequence[Tensor],
    ) -> _Operation:
        """An operation on whole tensors of the call, or on what others made."""
        del starts
        bases = self._bases(returned)
        found = [None if t is None else next((n for n, base in enumerate(bases) if base is t), -1) for t in tensors]
        if -1 in found:
            raise _OtherError("an operation is given a tensor that is none of the call's")
        return _Operation(function, found)

    def _launch_of(
        self,
        kernel: Any,
        grid: Any,
        args: tuple[Any, ...],
        meta: dict[str, Any],
        compiled: Any,
        starts: Mapping[int, int],
        returned: Sequence[Tensor],
    ) -> Any:
        """A launch with addresses as slots."""
        names = kernel.arg_names[len(args) :]
        if not all(isinstance(argument, _PASSED) for argument in args):
            raise _OtherError(f"{kernel.__name__} is given a descriptor")
        if not isinstance(grid, tuple) or any(name not in meta for name in names):
            raise _OtherError(f"{kernel.__name__} is launched with a grid or a constant of its own choosing")
        slots = [self._slot(n, a, starts, returned) for n, a in enumerate(args) if isinstance(a, Tensor)]
        arguments = [None if isinstance(argument, Tensor) else argument for argument in args]
        if compiled is None:
            return _Interpreted(kernel, grid, arguments, meta, slots)
        return _Compiled(compiled, grid, arguments + [meta[name] for name in names], slots)

    def _bases(self, returned: Sequence[Tensor]) -> list[Tensor | None]:
        """What addresses start from, in a replay's order; the scratch memory is nobody's tensor here."""
        return [*self._tensors, None, *returned, *self._made]

    def _slot(self, position: int, tensor: Tensor, starts: Mapping[int, int], returned: Sequence[Tensor]) -> Slot:
        """Where the address of an argument comes from."""
        bases = self._bases(returned)
        view = (tensor.dtype, tensor.shape, tensor.stride())
        storage = _storage(tensor)
        if storage in starts:
            return Slot(position, len(self._tensors), starts[storage] + _start(tensor), view)
        same = [n for n, base in enumerate(bases) if base is tensor]
        same = same or [n for n, base in enumerate(bases) if base is not None and _storage(base) == storage]
        if len(same) != 1:
            raise _OtherError("a kernel is given memory that is none of the call's tensors, or that several share")
        return Slot(position, same[0], _start(tensor) - _start(bases[same[0]]), view)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _start(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()
