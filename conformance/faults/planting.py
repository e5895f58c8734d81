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


class _EditedLoader(importlib.machinery.SourceFileLoader):
    """Loads a module from a text instead of its file, without a cache of its code."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self._text = text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._text, self.path, "exec", dont_inherit=True)

    def get_source(self, fullname: str) -> str:
        return self._text


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, loaders: Mapping[str, _EditedLoader]) -> None:
        self._loaders = loaders

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        loader = self._loaders.get(fullname)
        return None if loader is None else importlib.util.spec_from_file_location(fullname, loader.path, loader=loader)


def plant(package: str, texts: Mapping[str, str]) -> None:
    """From now on modules of `package` are loaded with the edited `texts`, by their names below its folder.

    Raises:
        RuntimeError: the package has been imported already.
    """
    loaded = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    if loaded:
        raise RuntimeError(f"expected a process that has not imported {package}, found {loaded[0]}")
    folder, loaders = folder_of(package), {}
    for name, text in texts.items():
        path = str(folder / name)
        module = ".".join([package, *Path(name).with_suffix("").parts]).removesuffix(".__init__")
        loaders[module] = _EditedLoader(module, path, text)
        # Without a time the entry is never compared with the file.
        linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    sys.meta_path.insert(0, _Finder(loaders))
