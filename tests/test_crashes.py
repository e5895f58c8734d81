"""What is stored survives `kill -9` at random moments, several writers, a full disk and a read-only folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_stores import STORES

HARNESS = Path(__file__).with_name("crash_harness.py")
KILLS, WRITERS = 100, 8


@pytest.fixture(scope="module", params=list(STORES))
def crashed(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What the harness saw of a store."""
    # Not below pytest's folder, which nobody but its owner may enter.
    with tempfile.TemporaryDirectory(prefix="moegate-") as place:
        os.chmod(place, 0o755)
        command = [sys.executable, str(HARNESS), request.param, str(KILLS), str(WRITERS), place]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout) | {"store": request.param}


def test_nothing_that_was_reported_as_written_is_lost_to_a_kill(crashed: dict[str, Any]) -> None:
    result = crashed["kill"]
    assert result["kills"] >= KILLS
    assert (result["lost"], result["broken"]) == ([], [])
    assert result["reported"] >= KILLS


def test_several_writers_lose_nothing_and_a_reader_sees_no_half(crashed: dict[str, Any]) -> None:
    result = crashed["write"]
    assert (result["lost"], result["broken"], result["failed"]) == ([], [], 0)
    assert result["reported"] == WRITERS * 12
    assert result["reads"] > 0


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_takes_nothing_is_a_clear_error_and_leaves_what_was_there(
    crashed: dict[str, Any], how: str
) -> None:
    if not STORES[crashed["store"]].refuses:
        pytest.skip("what this store cannot save is dispensable")
    result = crashed[how]
    assert result["said"].startswith("PermissionError" if how == "read-only" else "OSError"), result["said"]
    assert how in result["said"]
    assert result["after"] == result["before"]
    assert result["left"] == []


# --- the harness itself ------------------------------------------------------------------------------------------

CARELESS = """
import json
from pathlib import Path
import crash_stores

def write(folder, number):
    with (folder / "all.json").open("w") as stream:
        for piece in crash_stores.payload(number):
            stream.write(piece)
            stream.flush()

def read(folder):
    file = folder / "all.json"
    text = file.read_text() if file.exists() else ""
    number = int(text.partition(":")[0])
    if text != crash_stores.payload(number):
        raise ValueError("half")
    return [number]

crash_stores.STORES["careless"] = crash_stores.Store(write, read, keeps_last=True)
"""


def test_a_store_that_writes_in_place_is_found_out(tmp_path: Path) -> None:
    code = f"{CARELESS}\nimport crash_harness\ncrash_harness.main()"
    command = [sys.executable, "-c", code, "careless", "30", "0", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(HARNESS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    result = json.loads(done.stdout)
    assert result["kill"]["broken"]
