"""Kills the writers of a store at random moments, runs several at once, takes their disk away; prints what was lost.

`python tests/crash_harness.py STORE KILLS WRITERS FOLDER`, in a process of its own: its children are forked, so that a
kill costs no import.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from crash_stores import STORES, Store

# Items that a folder takes before a new one is begun: what a reader checks stays small.
ITEMS = 60


def _writer(store: Store, folder: Path, numbers: range, report: int) -> int:
    """A child that writes items one after the other, and reports each once it is written."""
    child = os.fork()
    if child == 0:
        try:
            for number in numbers:
                store.write(folder, number)
                os.write(report, f"{number}\n".encode())
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return child


def kill(store: Store, count: int, folder: Path, seed: int = 0) -> dict:
    """Kill `count` writers, each at a random moment of its work, and look for what they had reported."""
    moments = random.Random(seed)
    result = {"kills": 0, "finished": 0, "reported": 0, "lost": [], "broken": []}
    first, reported, place = 0, [0, 1, 2], folder / "0"
    place.mkdir(parents=True)
    # How long an item takes says when a kill is likely to fall into one.
    started = time.perf_counter()
    for number in reported:
        store.write(place, number)
    of_one = (time.perf_counter() - started) / len(reported)
    while result["kills"] < count:
        first = max(reported, default=first) + 1000
        reading, writing = os.pipe()
        child = _writer(store, place, range(first, first + 200), writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            # Some items, and then a moment within the next one.
            lines = [pipe.readline() for _ in range(moments.randrange(4))]
            time.sleep(moments.uniform(0, 1.5 * of_one))
            os.kill(child, signal.SIGKILL)
            reported += [int(line) for line in (*lines, *pipe.read().split()) if line]
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            result["kills"] += 1
        else:
            result["finished"] += 1
        try:
            result["lost"] += store.lost(place, reported)
        except Exception as error:
            result["broken"].append(f"{type(error).__name__}: {error}")
        if len(reported) > ITEMS or result["broken"]:
            result["reported"] += len(reported)
            shutil.rmtree(place)
            reported, place = [], folder / str(result["kills"])
            place.mkdir()
        if result["finished"] > count:
            raise RuntimeError("the writers are done before they are killed")
    result["reported"] += len(reported)
    return result


def write(store: Store, writers: int, folder: Path, items: int = 12) -> dict:
    """Several writers of one folder at once, while a reader looks; none of them is killed."""
    folder.mkdir(parents=True)
    reading, writing = os.pipe()
    children = [
        _writer(store, folder, range(writer * 1000, writer * 1000 + items), writing) for writer in range(writers)
    ]
    os.close(writing)
    result = {"reported": 0, "lost": [], "broken": [], "failed": 0, "reads": 0}
    with os.fdopen(reading, "rb") as pipe:
        running = set(children)
        while running:
            done, status = os.waitpid(-1, os.WNOHANG)
            if done:
                running.discard(done)
                result["failed"] += status != 0
                continue
            try:
                store.read(folder)
                result["reads"] += 1
                time.sleep(0.002)
            except Exception as error:
                result["broken"].append(f"{type(error).__name__}: {error}")
        reported = [int(line) for line in pipe.read().split()]
    result["reported"] = len(reported)
    # Of several who replace one thing, the last one wins: it need not be the largest number.
    lost = [] if store.keeps_last and set(store.read(folder)) <= set(reported) else store.lost(folder, reported)
    return result | {"lost": lost}


def refused(store: Store, how: str, folder: Path) -> dict:
    """One item into a folder that is read-only, or onto a disk without room, with an older item there."""
    folder.mkdir(parents=True)
    store.write(folder, 1)
    before = sorted(store.read(folder))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        if how == "full":
            # A file may grow to one block: what is written behind it fails as on a full disk.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
        elif os.geteuid() == 0:
            os.setuid(65534)  # root may write everywhere
        try:
            store.write(folder, 2)
            said = "written"
        except OSError as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    left = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.part"))
    try:
        after: object = sorted(store.read(folder))
    except Exception as error:
        after = f"{type(error).__name__}: {error}"
    return {"said": said, "before": before, "after": after, "left": left}


def main() -> None:
    """The command line."""
    name, kills, writers, folder = sys.argv[1:]
    store, place = STORES[name], Path(folder)
    # Whatever it imports is imported before anything is forked.
    (place / "first").mkdir(parents=True)
    store.write(place / "first", 0)
    result = {"kill": kill(store, int(kills), place / "kill")}
    if int(writers):
        result["write"] = write(store, int(writers), place / "write")
    if store.refuses:
        result |= {how: refused(store, how, place / how) for how in ("full", "read-only")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
