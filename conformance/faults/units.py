"""The suite's tests as plain calls, without pytest's collection, which would load the subject for all faults at once.

A unit is one test function with one set of parameters. What the tests ask of pytest is small (parametrised arguments,
a few fixtures, a skip), and all of it is done here.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _pytest.mark import ParameterSet

from ..session import Session

# In the suite's folder; `oracle` and `order` ask the same rules as their tests do, one question after the other.
MODULES = (
    *("route", "align", "experts", "large", "subject", "batched", "meta", "quant"),
    *("lora", "shared", "graph", "ep", "configs", "oracle", "api", "public"),
)
OWN = {"questions.py": "moegate.conformance.faults.questions"}


@dataclass(frozen=True)
class Unit:
    """One call of a test.

    Attributes:
        id: `FILE::FUNCTION[PARAMETERS]`.
        function: the test.
        facets: that the subject must define.
        parameters: from its marks, and `moegate_variant` where it takes one.
        module: whose fixtures it may ask for.
    """

    id: str
    function: Callable[..., None]
    facets: tuple[str, ...]
    parameters: dict[str, Any]
    module: Any

    def run(self, session: Session) -> None:
        """Call the test; whatever it raises is raised, pytest's skip among it."""
        with ExitStack() as stack:
            self.function(**_arguments(self.function, self.parameters, self.module, session, stack))


def _arguments(
    function: Callable[..., Any], parameters: dict[str, Any], module: Any, session: Session, stack: ExitStack
) -> dict[str, Any]:
    arguments = {}
    for name in inspect.signature(function).parameters:
        if name in parameters:
            arguments[name] = parameters[name]
        elif name == "moegate_session":
            arguments[name] = session
        elif name == "tmp_path":
            arguments[name] = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moegate-")))
        else:
            fixture = getattr(module, name)._get_wrapped_function()
            arguments[name] = fixture(**_arguments(fixture, parameters, module, session, stack))
    return arguments


def module_of(file: str) -> Any:
    """The module of a file of the suite, by its name there.

    Raises:
        ValueError: no such file.
    """
    name = OWN.get(file) or f"moegate.conformance.{Path(file).stem}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"tests: expected a file of the suite such as test_experts.py, got {file!r}") from error


def preload() -> None:
    """Import all that units need, before anything is planted."""
    for name in MODULES:
        module_of(f"test_{name}.py")
    for file in OWN:
        module_of(file)


def units_of(selector: str, session: Session, variants: tuple[str, ...] = ()) -> Iterator[Unit]:
    """The units of `FILE` or `FILE::PART_OF_A_NAME` that the session's subject has the facets for.

    Args:
        selector: a file of the suite, and part of the name of a test (with its parameters) there.
        session: with the subject.
        variants: of the subject; all of this device where empty.
    """
    file, _, part = selector.partition("::")
    module = module_of(file)
    everywhere = getattr(module, "pytestmark", [])
    everywhere = everywhere if isinstance(everywhere, list) else [everywhere]
    for name, function in vars(module).items():
        if not name.startswith("test_") or function.__module__ != module.__name__:
            continue
        marks = [*getattr(function, "pytestmark", []), *everywhere]
        facets = next((mark.args for mark in marks if mark.name == "moegate_facets"), ())
        for parameters, shown in _parameter_sets(marks):
            for variant in _variants(function, session, variants):
                own = parameters | ({"moegate_variant": variant} if variant else {})
                id = f"{file}::{name}[{'-'.join([*([variant] if variant else []), *shown])}]"
                have = session.subject.facets(variant or session.subject.variants[0])
                if part in id and set(facets) <= set(have):
                    yield Unit(id, function, facets, own, module)


def _variants(function: Callable[..., Any], session: Session, wanted: tuple[str, ...]) -> list[str | None]:
    if "moegate_variant" not in inspect.signature(function).parameters:
        return [None]
    return [variant for variant in session.variants() if not wanted or variant in wanted]


def _parameter_sets(marks: list[Any]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Every combination of the parametrised arguments, and how each is shown."""
    axes = []
    for mark in marks:
        if mark.name != "parametrize":
            continue
        names, values = mark.args[:2]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        axis = []
        for value in values:
            plain, shown = (value.values, value.id) if isinstance(value, ParameterSet) else (value, None)
            if not isinstance(value, ParameterSet):
                plain = (value,) if len(names) == 1 else tuple(value)
            axis.append((dict(zip(names, plain, strict=True)), shown or "-".join(str(item) for item in plain)))
        axes.append(axis)
    for combination in itertools.product(*axes):
        merged: dict[str, Any] = {}
        for values, _ in combination:
            merged |= values
        yield merged, [shown for _, shown in combination]
