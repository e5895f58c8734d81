"""Other implementations timed beside ours, interleaved in the same run.

A peer is a callable in any Python file, with the signature of `fused_experts` as far as `ExpertsCall` gives it. It
runs in this process, so it may import whatever this environment has.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import cast

from .installed_peers import NAMES, installed_peer
from .operands import ExpertsCall


def load_peer(reference: str) -> tuple[str, ExpertsCall]:
    """The peer at `path/to/file.py:callable`, with its name: the file's `NAME`, else its stem; or an installed engine.

    Raises:
        ValueError: not that form, no such file, no such callable, a file that fails to load, or no such engine here.
    """
    if reference in NAMES:
        return installed_peer(reference)
    path_text, separator, attribute = reference.rpartition(":")
    path = Path(path_text).expanduser().resolve()
    if not separator or not attribute.isidentifier() or path.suffix != ".py":
        raise ValueError(f"peer: expected {', '.join(NAMES)} or path/to/file.py:callable, got {reference!r}")
    if not path.is_file():
        raise ValueError(f"peer: expected a file, got {path}")
    module_name = f"moegate_peer_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"peer: expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    # Triton looks kernels' modules up by name.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ValueError(f"peer: {path} failed to load: {type(error).__name__}: {error}") from error
    call = getattr(module, attribute, None)
    if not callable(call):
        raise ValueError(f"peer: expected a callable {attribute} in {path}, got {type(call).__name__}")
    return str(getattr(module, "NAME", path.stem)), cast(ExpertsCall, call)
