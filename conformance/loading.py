"""Subjects by name and from a user's file, and everything that can be wrong with one before it is called."""

from __future__ import annotations

import difflib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import traceback
import types
from dataclasses import fields
from pathlib import Path

from .numerics import Numerics
from .spec import (
    ACTIVATIONS,
    BIASES,
    CORRECTION_BIASES,
    COUNTS,
    DTYPES,
    GROUP_RANKINGS,
    GROUPS,
    LOGITS,
    MAPS,
    PADDINGS,
    ROUTINGS,
    SCALINGS,
    SCHEMES,
    SCORINGS,
    WEIGHTS,
)
from .subject import FACETS, Capabilities, Subject

# Where the subjects by name are, and what they need beside moegate's own packages, by its module.
SHIPPED = {
    "moegate": "moegate:MoegateSubject",
    "moegate:flashinfer_cutlass": "moegate_flashinfer:MoegateFlashinferSubject",
    "moegate:kernel_forms": "moegate_forms:MoegateFormsSubject",
    "moegate:scaled_forms": "moegate_forms:MoegateScaledFormsSubject",
    "moegate:replayed": "moegate_replayed:MoegateReplayedSubject",
    "torch": "eager:EagerSubject",
    "transformers": "transformers_blocks:TransformersSubject",
    "transformers:deepseek_v3": "transformers_blocks:DeepseekV3Subject",
    "transformers:gpt_oss": "transformers_blocks:GptOssSubject",
    "vllm": "vllm_experts:VllmSubject",
    "sglang": "sglang_experts:SglangSubject",
    "flashinfer": "flashinfer_experts:FlashinferSubject",
}
NEEDS = {
    "moegate:flashinfer_cutlass": ("flashinfer", "pip install 'moegate[flashinfer]'"),
    "transformers": ("transformers", "pip install 'transformers>=5.20'"),
    "vllm": ("vllm", "pip install vllm"),
    "sglang": ("sglang", "pip install 'sglang[all]'"),
    "flashinfer": ("flashinfer", "pip install flashinfer-python"),
}
# The names that a field of the capabilities may hold.
_NAMES: dict[str, tuple[str, ...]] = {
    "devices": ("cpu", "cuda"),
    "dtypes": DTYPES,
    "routings": ROUTINGS,
    "weights": WEIGHTS,
    "maps": MAPS,
    "counts": COUNTS,
    "logits": LOGITS,
    "schemes": tuple(SCHEMES),
    "batched_schemes": tuple(SCHEMES),
    "activations": tuple(ACTIVATIONS),
    "biases": BIASES,
    "scorings": SCORINGS,
    "groups": GROUPS,
    "group_rankings": GROUP_RANKINGS,
    "correction_biases": CORRECTION_BIASES,
    "scalings": tuple(SCALINGS),
    "paddings": PADDINGS,
}

# Of the name of a subject or a variant.
MOST_CHARACTERS = 100


class NotInstalledError(Exception):
    """A subject that ships here needs a package that is not installed; says how to install it."""


def needed(name: str) -> tuple[str, str]:
    """The module that a subject by name needs beside moegate's own, and how it is installed; empty where none."""
    return next((need for start, need in NEEDS.items() if f"{name}:".startswith(f"{start}:")), ("", ""))


def load_subject(name: str) -> Subject:
    """A subject that ships here, by name, or a user's own: `path/to/file.py:Class` or `package.module:Class`.

    A further `:variant` leaves that variant alone: `moegate:triton`, `path/to/file.py:Class:fast`.

    Raises:
        ValueError: an unknown name or variant, a file that is not there or does not import, no such class, a class that
            is no Subject, cannot be made without arguments, lacks a call or declares what the suite does not know.
        NotInstalledError: a subject of another project, which is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"subject: expected a name, got {type(name).__name__}")
    if not name.isprintable():
        raise ValueError(f"subject: expected one of {sorted(SHIPPED)} or FILE.py:CLASS, got {name!a:.200}")
    package, _, variant = name.partition(":")
    if package in SHIPPED:
        module, install = needed(name)
        if module and importlib.util.find_spec(module) is None:
            raise NotInstalledError(f"subject {name}: {module} is not installed here: {install}")
        shipped = next(each for each in sorted(SHIPPED, reverse=True) if f"{name}:".startswith(f"{each}:"))
        variant = name.removeprefix(shipped).removeprefix(":")
        place, class_name = f"{__package__}.subjects.{SHIPPED[shipped]}".split(":")
    else:
        place, class_name, variant = _parts(name)
    cls = getattr(_module_of(place, name), class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, Subject)):
        found = "nothing of that name" if cls is None else repr(cls)
        raise ValueError(
            f"subject: expected {class_name} of {place} to be a class derived from "
            f"moegate.conformance.subject.Subject, got {found}"
        )
    try:
        subject = cls()
    except Exception as error:
        raise ValueError(f"subject: {class_name}() does not come to be: {_said(error, place)}") from error
    _check(subject, name)
    if variant:
        if variant not in subject.variants:
            raise ValueError(f"subject: expected a variant of {sorted(subject.variants)}, got {variant!r} in {name!r}")
        subject.variants = (variant,)  # of this instance alone
    return subject


def _parts(name: str) -> tuple[str, str, str]:
    """Place, class and variant (or an empty string) of `PLACE:CLASS[:VARIANT]`; a place may be a drive's path."""
    head, separator, rest = name.partition(".py:")
    place = f"{head}.py" if separator else name.partition(":")[0]
    class_name, _, variant = (rest if separator else name.partition(":")[2]).partition(":")
    if not place or not class_name:
        near = difflib.get_close_matches(name, SHIPPED, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"subject: expected one of {sorted(SHIPPED)} or FILE.py:CLASS, got {name!r}{meant}")
    return place, class_name, variant


def _module_of(place: str, name: str) -> types.ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"subject: expected an importable module, got {place!r}: {error}") from error
        except Exception as error:
            raise ValueError(f"subject: {place} of {name!r} does not import: {_said(error, place)}") from error
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"subject: expected a file, got {place!r}, which does not exist")
    # Under a name that is nobody else's, whatever the file is called; Triton and pickle look modules up by it.
    module_name = f"moegate_subject_{path.stem}"
    module = types.ModuleType(module_name)
    module.__file__ = str(path)
    sys.modules[module_name] = module
    # Modules beside the file are found as when it is run by Python, but hide nobody else's.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        importlib.machinery.SourceFileLoader(module_name, str(path)).exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ValueError(f"subject: {place} does not import: {_said(error, str(path))}") from error
    return module


def _said(error: BaseException, place: str) -> str:
    """What an exception says, and the last line of `place` that it came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == place]
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    at = f" (line {line})" if line else ""
    return f"{type(error).__name__}: {getattr(error, 'msg', None) or error}{at}"


def _check(subject: Subject, name: str) -> None:
    """Everything about a subject that can be wrong before it is called.

    Raises:
        ValueError: what, what was expected, and what there is.
    """
    if not (isinstance(subject.name, str) and subject.name):
        raise ValueError(f"subject {name}: expected a name, which every report shows, got {subject.name!r}")
    if not isinstance(subject.numerics, Numerics):
        raise ValueError(f"subject {name}: expected numerics to be a Numerics(...), got {subject.numerics!r}")
    _check_capabilities(subject.capabilities, name)
    if not subject.variants or isinstance(subject.variants, str):
        raise ValueError(f"subject {name}: expected variants to be a tuple of names, got {subject.variants!r}")
    for said in (subject.name, *subject.variants):
        # It stands in every table, report and test's name.
        if isinstance(said, str) and not (said.isprintable() and len(said) <= MOST_CHARACTERS):
            raise ValueError(
                f"subject: expected printable names of at most {MOST_CHARACTERS} characters, got {said!a:.200}"
            )
    _check_calls(subject, name)


def _check_capabilities(capabilities: Capabilities, name: str) -> None:
    if not isinstance(capabilities, Capabilities):
        raise ValueError(f"subject {name}: expected capabilities to be a Capabilities(...), got {capabilities!r}")
    for f in fields(Capabilities):
        value = getattr(capabilities, f.name)
        if f.name in _NAMES and value is not None:
            unknown = [each for each in value if each not in _NAMES[f.name]] if isinstance(value, tuple) else [value]
            if unknown or not value:
                known = ", ".join(_NAMES[f.name])
                raise ValueError(
                    f"subject {name}: capabilities.{f.name}: expected a tuple of some of {known}, got {value!r}"
                )
    # What the smallest cases of every pair of features need.
    if capabilities.min_experts not in (1, 2, 3):  # every pair of features is run with three experts or more
        raise ValueError(
            f"subject {name}: capabilities.min_experts: expected 1, 2 or 3, got {capabilities.min_experts!r}"
        )
    for limit, least in (("hidden_multiple", 1), ("intermediate_multiple", 1), ("max_experts", 8), ("max_top_k", 2)):
        value = getattr(capabilities, limit)
        if (value is None and limit.startswith("max")) or (isinstance(value, int) and value >= least):
            continue
        raise ValueError(f"subject {name}: capabilities.{limit}: expected at least {least}, got {value!r}")


def _check_calls(subject: Subject, name: str) -> None:
    cls = type(subject)
    defined = [facet for facet in FACETS if getattr(cls, facet) is not getattr(Subject, facet)]
    for own in {own for base in cls.__mro__ if issubclass(base, Subject) and base is not Subject for own in vars(base)}:
        near = difflib.get_close_matches(own, [*FACETS, "prepare", "facets", "unavailable"], 1, 0.8)
        if near and callable(getattr(cls, own, None)) and not own.startswith("_") and not hasattr(Subject, own):
            raise ValueError(f"subject {name}: {own} is no call of the suite; did you mean {near[0]}?")
    for call in (
        *(facet for facet in defined if callable(getattr(Subject, facet))),
        "prepare",
        "facets",
        "unavailable",
    ):
        expected = list(inspect.signature(getattr(Subject, call)).parameters.values())[1:]
        positional = [p.name for p in expected if p.kind is not p.KEYWORD_ONLY]
        try:
            signature = inspect.signature(getattr(subject, call))
            signature.bind(*positional, **{p.name: None for p in expected if p.kind is p.KEYWORD_ONLY})
        except TypeError as error:
            wanted = ", ".join(p.name for p in expected)
            raise ValueError(f"subject {name}: expected {call}(self, {wanted}): {error}") from error
    for variant in subject.variants:
        lacking = [facet for facet in subject.facets(variant) if facet not in defined]
        if lacking:
            raise ValueError(f"subject {name}: variant {variant} names the call {lacking[0]}, which is not defined")
    if not any(subject.facets(variant) for variant in subject.variants):
        raise ValueError(
            f"subject {name}: lacks a call: expected at least one of {', '.join(FACETS)} to be defined; a layer "
            "defines experts(self, case, variant)"
        )
