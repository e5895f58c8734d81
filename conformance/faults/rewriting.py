"""Kernels that Triton's interpreter rewrites once for all hunts, where every child would do it for itself.

Before it runs a kernel the interpreter reads its source, parses, rewrites and compiles it, which takes longer than many
a case. What comes of it is kept by the text of the whole file, so that one with a fault in it is rewritten anew.
"""

from __future__ import annotations

import hashlib
import linecache
import marshal
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

from triton.runtime import interpreter as upstream

from ..interpreter import define

# File, line, and a digest of the file's text.
_Key = tuple[str, int, str]
_rewritten: dict[_Key, CodeType] = {}


def _key(function: Callable[..., Any]) -> _Key | None:
    """None where the source is not in a file."""
    file, line = function.__code__.co_filename, function.__code__.co_firstlineno
    linecache.checkcache(file)
    text = "".join(linecache.getlines(file))
    return (file, line, hashlib.sha256(text.encode()).hexdigest()) if text else None


def install() -> None:
    """From now on this process, and its children, keep what was rewritten; the interpreter has been repaired."""
    rewriter = upstream.FunctionRewriter
    rewrite_upstream = rewriter.rewrite_ast

    def rewrite_ast(self: Any) -> Any:
        key = _key(self.fn)
        known = None if key is None else _rewritten.get(key)
        return rewrite_upstream(self) if known is None else define(self.fn, known, self.kwargs)

    def compile_and_exec(self: Any, transformed_ast: Any) -> Any:
        code = compile(transformed_ast, filename=self.filename, mode="exec")
        key = _key(self.fn)
        if key is not None:
            _rewritten[key] = code
        return define(self.fn, code, self.kwargs)

    rewriter.rewrite_ast, rewriter._compile_and_exec = rewrite_ast, compile_and_exec


def rewrite_all() -> bytes:
    """Rewrite the kernels of every module that this process has imported.

    Returns:
        For `take_over`, in another process of the same interpreter.
    """
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            if isinstance(value, upstream.InterpretedFunction):
                value.rewrite()
    return marshal.dumps(_rewritten)


def take_over(rewritten: bytes) -> None:
    """Keep what another process rewrote."""
    _rewritten.update(marshal.loads(rewritten))
