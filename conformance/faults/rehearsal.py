"""What a child that has nothing planted finds out for all children, as the server must not import what is judged."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Iterable
from typing import Any

from ..loading import load_subject
from . import rewriting
from .hunt import silence
from .planting import modules_with_kernels


def rehearse(subjects: Iterable[str], packages: Iterable[str], *, interprets: bool) -> list[Any]:
    """Load subjects in a child that ends right after; keep its rewritten kernels in this process.

    Args:
        subjects: by name.
        packages: whose sources are judged, compiled already.
        interprets: kernels run under Triton's interpreter.

    Returns:
        The capabilities of each subject that can be loaded.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            _tell(writing, subjects, packages, interprets=interprets)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        data = stream.read()
    os.waitpid(pid, 0)
    if not data:
        return []
    declared, rewritten = pickle.loads(data)
    if rewritten:
        rewriting.take_over(rewritten)
    return declared


def _tell(pipe: int, subjects: Iterable[str], packages: Iterable[str], *, interprets: bool) -> None:
    silence()
    declared = []
    for subject in subjects:
        try:
            declared.append(load_subject(subject).capabilities)
        except Exception:
            continue  # whatever a user's file raises: every hunt of its faults says so
    rewritten = b""
    if interprets:
        for module in [module for package in packages for module in modules_with_kernels(package)]:
            try:
                importlib.import_module(module)
            except Exception:
                continue  # needs what is not here, and is then rewritten by whoever has it
        rewritten = rewriting.rewrite_all()
    data = pickle.dumps((declared, rewritten))
    with os.fdopen(pipe, "wb") as stream:
        stream.write(data)
