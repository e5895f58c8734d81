"""What is stored on disk, for the crash tests: one line in `STORES` makes a store's writers be killed.

A store's `write` returns once an item counts as written; whatever happens to its process after that, `read` finds it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace


@dataclass(frozen=True)
class Store:
    """One kind of stored data.

    Attributes:
        write: writes item `number` into a folder.
        read: the items that a folder holds, each checked to be whole; raises where one is not.
        keeps_last: a newer item takes the place of an older one, instead of standing beside it.
        refuses: what the disk does not take is an error. Hypothesis holds its examples dispensable: one that cannot be
            saved is left out, one that is cut off is dropped when it is read, and a finding is reported either way.
    """

    write: Callable[[Path, int], None]
    read: Callable[[Path], Collection[int]]
    keeps_last: bool = False
    refuses: bool = True

    def lost(self, folder: Path, reported: Collection[int]) -> list[int]:
        """Items that were reported as written and are not there."""
        there = self.read(folder)
        if self.keeps_last:
            return [] if not reported or any(number >= max(reported) for number in there) else sorted(reported)
        return sorted(set(reported) - set(there))


def payload(number: int) -> str:
    """Of a few kilobytes, so that half of it would show."""
    return f"{number}:" + "x" * 3000


# --- tuned files: what `moegate tune` adds to --------------------------------------------------------------------


def _tuned_file(folder: Path):
    from moegate.bench.tune import TunedFileOfLayer
    from moegate.impl.tuning.names import ConfigKey

    key = ConfigKey.parse("E=8,N=32,H=64,top_k=2,device_name=NVIDIA_H200.json")
    return TunedFileOfLayer(folder, key, "3.6.0", "NVIDIA H200")


def _write_tuned(folder: Path, number: int) -> None:
    from moegate.impl.tuning.kernel_config import KernelConfig

    tile = KernelConfig(16, 32, 16)
    workload = SimpleNamespace(num_tokens=number + 1)
    _tuned_file(folder).add(SimpleNamespace(workload=workload, pair=(tile, tile), about=lambda: {"number": number}))


def _read_tuned(folder: Path) -> list[int]:
    file = _tuned_file(folder)
    file.load()
    for tokens in file.entries:
        if file.about[str(tokens)] != {"number": tokens - 1}:
            raise ValueError(f"{file.path}: {tokens} tokens are not as they were written")
    return [tokens - 1 for tokens in file.entries]


# --- results of `--json` -----------------------------------------------------------------------------------------


def _write_report(folder: Path, number: int) -> None:
    from moegate.impl.whole_file import write_whole

    write_whole(folder / "report.json", json.dumps({"number": number, "payload": payload(number)}) + "\n")


def _read_report(folder: Path) -> list[int]:
    file = folder / "report.json"
    if not file.exists():
        return []
    report = json.loads(file.read_text())
    if report["payload"] != payload(report["number"]):
        raise ValueError(f"{file}: not as it was written")
    return [report["number"]]


# --- Hypothesis's example database, as the profiles nightly and soak use it --------------------------------------


def _write_example(folder: Path, number: int) -> None:
    from hypothesis.database import DirectoryBasedExampleDatabase

    DirectoryBasedExampleDatabase(folder / "examples").save(b"property", payload(number).encode())


def _read_examples(folder: Path) -> list[int]:
    from hypothesis.database import DirectoryBasedExampleDatabase

    numbers = []
    for value in DirectoryBasedExampleDatabase(folder / "examples").fetch(b"property"):
        number = int(value.partition(b":")[0])
        if value.decode() != payload(number):
            raise ValueError(f"example {number} is not as it was written")
        numbers.append(number)
    return numbers


# --- the history of benchmarks -----------------------------------------------------------------------------------


def _write_history(folder: Path, number: int) -> None:
    from moegate.bench.history.store import Store as History

    History(folder / "history").promote(f"{number:012x}", {"payload": payload(number)})


def _read_history(folder: Path) -> list[int]:
    from moegate.bench.history.store import Store as History

    history = History(folder / "history")
    numbers = []
    for entry in history.entries():
        _, data = history.read(entry)
        number = int(data["payload"].partition(":")[0])
        if data["payload"] != payload(number):
            raise ValueError(f"{entry.path} is not as it was written")
        numbers.append(number)
    return numbers


# --- what an interrupted gate goes on from -----------------------------------------------------------------------


def _write_cell(folder: Path, number: int) -> None:
    from moegate.bench.gate.store import Store as Cells

    # One writer to a pair: a gate is one process.
    cells = Cells(folder / "state")
    cells.put(number // 1000, f"workload {number}", {"payload": payload(number)})


def _read_cells(folder: Path) -> list[int]:
    from moegate.bench.gate.store import Store as Cells

    cells = Cells(folder / "state")
    if cells.set_aside:
        raise ValueError(f"{cells.set_aside}: not whole")
    return [int(name.split()[1]) for of_pair in cells._cells.values() for name in of_pair]


STORES = {
    "tuned files": Store(_write_tuned, _read_tuned),
    "JSON results": Store(_write_report, _read_report, keeps_last=True),
    "example database": Store(_write_example, _read_examples, refuses=False),
    "benchmark history": Store(_write_history, _read_history),
    "unfinished gate": Store(_write_cell, _read_cells),
}
