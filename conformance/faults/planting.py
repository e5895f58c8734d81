"""Put an edited source in the place of a module's own, in this process alone.

The implementation has no hooks: a finder at the front of `sys.meta_path` serves the edited text when the module is
first imported. The text goes by the file's own name, so that tracebacks and `__file__` are right, and stands in
`linecache`, whence `inspect` and so Triton read the source of kernels.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType

from .fault import folder_of

_Code = tuple[Path, CodeType]
# By the module's name: the file, and its code; what every child loads is compiled once, before it is forked.
_compiled: dict[str, _Code] = {}


def compile_package(package: str) -> None:
    """Compile every module of a package, without running any of it."""
    folder = folder_of(package)
    for path in sorted(folder.rglob("*.py")):
        _compiled[_module_of(package, path.relative_to(folder))] = (path, _code(path, path.read_text()))


def modules_with_kernels(package: str) -> list[str]:
    """The modules of a compiled package that define Triton kernels, so that few are imported which nobody asked for."""
    own = [(name, code) for name, (_, code) in _compiled.items() if name.startswith(f"{package}.")]
    return [name for name, code in own if "jit" in code.co_names]


def _module_of(package: str, path: Path) -> str:
    return ".".join([package, *path.with_suffix("").parts]).removesuffix(".__init__")


def _code(path: Path, text: str) -> CodeType:
    return compile(text, str(path), "exec", dont_inherit=True)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from code that is there already."""

    def __init__(self, name: str, code: _Code) -> None:
        super().__init__(name, str(code[0]))
        self._code = code[1]

    def get_code(self, fullname: str) -> CodeType:
        return self._code


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, codes: Mapping[str, _Code]) -> None:
        self._codes = codes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        code = self._codes.get(fullname)
        if code is None:
            return None
        return importlib.util.spec_from_file_location(fullname, code[0], loader=_Loader(fullname, code))


def plant(package: str, texts: Mapping[str, str]) -> None:
    """From now on modules of `package` are loaded with the edited `texts`, by their names below its folder.

    Raises:
        RuntimeError: the package has been imported already.
    """
    if package in sys.modules:  # as it is where any of its modules is
        raise RuntimeError(f"expected a process that has not imported {package}")
    folder, codes = folder_of(package), dict(_compiled)
    for name, text in texts.items():
        path = folder / name
        codes[_module_of(package, Path(name))] = (path, _code(path, text))
        # Without a time the entry is never compared with the file.
        linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    sys.meta_path.insert(0, _Finder(codes))
