"""What an unfinished run has measured, on disk: an interrupted run goes on where it stopped, and loses one workload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .record import write_json

_SCHEMA = "moegate-gate-state/1"


class Store:
    """The cells of one run: what one pair of processes measured of one workload.

    Args:
        folder: of this run alone; files in it that are not whole are set aside under another name.
        fresh: forget what an earlier run left.

    Attributes:
        resumed: how many cells an earlier run left.
        set_aside: files that were there and could not be read.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder = folder
        self.set_aside: list[Path] = []
        self._cells: dict[int, dict[str, dict[str, Any]]] = {}
        self._checks: dict[str, dict[str, Any]] = {}
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        for file in sorted(folder.glob("pair-*.json")) if folder.is_dir() else []:
            data = self._read(file)
            if data is not None:
                self._cells[int(data["pair"])] = data["cells"]
        checks = folder / "checks.json"
        if checks.is_file() and (data := self._read(checks)) is not None:
            self._checks = data["checks"]
        self.resumed = sum(len(cells) for cells in self._cells.values())

    def _read(self, file: Path) -> dict[str, Any] | None:
        try:
            data = json.loads(file.read_text())
            if data["schema"] != _SCHEMA or not isinstance(data.get("cells", data.get("checks")), dict):
                raise ValueError("schema")
        except (OSError, ValueError, KeyError, TypeError):
            aside = file.with_suffix(".damaged")
            file.replace(aside)
            self.set_aside.append(aside)
            return None
        return data

    def cell(self, pair: int, workload: str) -> dict[str, Any] | None:
        """What a pair measured of a workload; None where it has not."""
        return self._cells.get(pair, {}).get(workload)

    def put(self, pair: int, workload: str, cell: Mapping[str, Any]) -> None:
        """Keep a cell."""
        self._cells.setdefault(pair, {})[workload] = dict(cell)
        data = {"schema": _SCHEMA, "pair": pair, "cells": self._cells[pair]}
        write_json(self.folder / f"pair-{pair:03}.json", data)

    def cells(self, workload: str) -> list[dict[str, Any]]:
        """All cells of a workload, by the pair's number."""
        return [cells[workload] for _, cells in sorted(self._cells.items()) if workload in cells]

    def checks(self, side: str) -> dict[str, Any] | None:
        """What the side's processes said when they verified the workloads; None where they have not."""
        return self._checks.get(side)

    def put_checks(self, side: str, checks: Mapping[str, Any]) -> None:
        """Keep them."""
        self._checks[side] = dict(checks)
        write_json(self.folder / "checks.json", {"schema": _SCHEMA, "checks": self._checks})

    def finish(self) -> None:
        """The run is over: the next one begins anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
