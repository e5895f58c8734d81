"""What `docs/faults.md` says of the catalogue and of mutants, from the files that are checked in.

python -m moegate.conformance.faults.document docs/faults.md
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..catalogue import PROPERTIES
from .fault import Fault, load_catalogue
from .record import Killed, read_matrix, read_witnesses
from .survivors import MUTANTS

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def as_markdown() -> str:
    """The generated part of the document, with its marks."""
    faults, witnesses = load_catalogue(), read_witnesses()
    parts = [
        _areas(faults, witnesses),
        _properties(faults, witnesses),
        _added(faults),
        _equivalents(faults),
        _gpu(faults),
        _mutants(),
    ]
    return "\n\n".join([BEGIN, *("\n".join(part) for part in parts), END])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[str] = ()) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("--:" if name in numbers else "---" for name in head) + "|"
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


def _areas(faults: Sequence[Fault], witnesses: Mapping[str, Killed]) -> Iterator[str]:
    yield "### Faults by area\n"
    rows = []
    for area in sorted({fault.area for fault in faults}):
        mine = [fault for fault in faults if fault.area == area]
        rows.append(_row_of(area, mine, witnesses))
    rows.append(_row_of("all", faults, witnesses))
    head = ("area", "faults", "on a CPU", "killed there", "on a GPU alone", "equivalent", "median cases", "threads")
    yield from _table(head, rows, head[1:])


def _row_of(name: str, faults: Sequence[Fault], witnesses: Mapping[str, Killed]) -> tuple[Any, ...]:
    real = [fault for fault in faults if not fault.equivalent]
    gpu = sum("cuda" in fault.needs for fault in real)
    killed = [witnesses[fault.id] for fault in real if fault.id in witnesses]
    threads = {thread for fault in real for thread in fault.threads}
    median = f"{statistics.median(k.cases for k in killed):g}" if killed else "-"
    return name, len(real), len(real) - gpu, len(killed), gpu, len(faults) - len(real), median, len(threads)


def _properties(faults: Sequence[Fault], witnesses: Mapping[str, Killed]) -> Iterator[str]:
    yield "### Kills by property\n"
    seen = {fault.id: list(witnesses[fault.id].by) for fault in faults if fault.id in witnesses}
    yield (
        "Of the one case that killed a fault: every property that it violated (*kills*), and the faults that no other "
        "property saw in that case (*unique*).\n"
    )
    columns = [*_kills(seen)]
    head = ["property", "kills", "unique"]
    outcomes = read_matrix(faults)
    if outcomes:
        matrix = {id: [p for p in row if p in PROPERTIES] for id, row in outcomes.items()}
        yield (
            f"`moegate faults --matrix --scale 0.1` on {len(matrix)} faults of all areas, drawn by hash, with a few "
            "cases of every applicable property: how many a property saw (*of the matrix*), and it alone (*unique*).\n"
        )
        columns += _kills(matrix)
        head += ["of the matrix", "unique"]
    expected = Counter(id for fault in faults if not fault.equivalent for id in fault.expect)
    known = {*PROPERTIES, *(id for column in columns for id in column)}
    rows = [
        (
            id,
            *(column[id] for column in columns),
            expected[id],
            PROPERTIES[id].sentence if id in PROPERTIES else "",
        )
        for id in sorted(known, key=lambda id: (id not in PROPERTIES, id))
    ]
    yield from _table((*head, "expected of", "what must hold"), rows, (*head[1:], "expected of"))


def _kills(seen: Mapping[str, Sequence[str]]) -> tuple[Counter[str], Counter[str]]:
    """How many faults each property saw, and how many it alone."""
    return Counter(id for by in seen.values() for id in by), Counter(by[0] for by in seen.values() if len(by) == 1)


def _added(faults: Sequence[Fault]) -> Iterator[str]:
    yield "### Faults that survived when they were first planted\n"
    yield from _table(
        ("fault", "what the suite lacked, or gained to kill it"), [(f.id, f.added) for f in faults if f.added]
    )


def _equivalents(faults: Sequence[Fault]) -> Iterator[str]:
    yield "### Edits that change nothing that anybody can observe\n"
    yield "They are listed, checked to fit the source, and never count.\n"
    yield from _table(("edit", "why"), [(f.id, f.equivalent) for f in faults if f.equivalent])


def _gpu(faults: Sequence[Fault]) -> Iterator[str]:
    yield "### Faults that show on a GPU alone\n"
    yield "`moegate faults --device cuda` hunts them.\n"
    rows = [(f.id, ", ".join(f.expect)) for f in faults if "cuda" in f.needs and not f.equivalent]
    yield from _table(("fault", "expected to be killed by"), rows)


def _mutants() -> Iterator[str]:
    yield "### Mutants\n"
    if not MUTANTS.exists():
        yield "No run is checked in."
        return
    data = json.loads(MUTANTS.read_text())
    survivors = data["survivors"]
    total, killed = data["mutants"], data["killed"]
    by = Counter(survivor["verdict"] for survivor in survivors)
    real = total - by["equivalent"]
    now, anywhere = killed + by["later"], killed + by["later"] + by["elsewhere"]
    yield (
        f"`moegate faults --mutate {data['count']} --seed {data['seed']}`: the suite killed {killed} of {total} "
        f"({_percent(killed, total)}), {data['by_error']} of them by an error that the call raised or a signal, and no "
        f"property. Of the {len(survivors)} others {by['equivalent']} are equivalent, {by['later']} are killed by what "
        f"was added since or by a longer hunt, {by['elsewhere']} by the project's tests, which are not part of the "
        f"suite, {by['unjudged']} change what the suite is right not to judge, and {by['open']} are open. Of the "
        f"{real} that are not equivalent the suite kills {now} ({_percent(now, real)}), and with the tests {anywhere} "
        f"({_percent(anywhere, real)}).\n"
    )
    yield from _table(
        ("module", "mutants", "killed in the run"),
        [(area, *numbers) for area, numbers in sorted(data["areas"].items())],
        ("mutants", "killed in the run"),
    )
    yield ""
    rows = [(s["id"], s["change"], s["verdict"], s["why"]) for s in survivors]
    yield from _table(("survivor", "change", "verdict", "why"), rows)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def write(path: Path) -> None:
    """Put the generated part into a document.

    Raises:
        ValueError: a document without the marks.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: expected the marks {BEGIN} and {END}")
    path.write_text(before + as_markdown() + after)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
