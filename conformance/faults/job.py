"""What the server is asked to do, and what came of it. No heavy import: the command line reads these."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from .fault import Edit, Fault


@dataclass
class Witness:
    """A case that kills a fault.

    Attributes:
        unit: the test's id.
        spec: the case's line; None where the test is the case.
    """

    unit: str
    spec: str | None = None


@dataclass
class Outcome:
    """What came of one fault.

    Attributes:
        id, area: the fault's.
        killed: something was violated.
        by: what was violated in the case that killed it, what is expected first; `error:TYPE`, `signal:NAME`, `hang`.
        expected: one of `by` is among what the catalogue expects.
        cases: executions judged until then, that one included.
        seconds: from the fork on.
        witness: the case.
        detail: of the violation, in words; of a survivor, what ended the hunt before all its cases had run.
        from_witness: the case that is checked in killed it, without a search.
        broken: why the hunt itself failed, which says nothing of the fault; empty where it did not.
        kills: for a matrix: by what may kill, in how many cases it did, and how many cases it judged.
    """

    id: str
    area: str
    killed: bool = False
    by: list[str] = field(default_factory=list)
    expected: bool = False
    cases: int = 0
    seconds: float = 0.0
    witness: Witness | None = None
    detail: str = ""
    from_witness: bool = False
    broken: str = ""
    kills: dict[str, list[int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Outcome:
        """The inverse of `as_dict`."""
        witness = data.get("witness")
        return Outcome(**{**data, "witness": None if witness is None else Witness(**witness)})


@dataclass(frozen=True)
class Orders:
    """How a hunt is done.

    Attributes:
        device: torch device type.
        scale: multiplies the number of drawn cases.
        witness: what is tried before the search; None: the search alone.
        search: whether there is one where the witness does not kill.
        everything: do not stop at a kill; count the kills of each property (a matrix).
        any_kill: whatever is violated is expected.
        quickest: so many cases more are looked at after a kill; the one that killed in the least time is the witness.
        silence_s: a hunt that is not heard of for so long hangs.
        limit_s: a hunt is ended after so long, whatever it says; what it did not kill until then survives.
    """

    device: str = "cpu"
    scale: float = 1.0
    witness: Witness | None = None
    search: bool = True
    everything: bool = False
    any_kill: bool = False
    quickest: int = 0
    silence_s: float = 60.0
    limit_s: float = 300.0


@dataclass
class Job:
    """A fault and the orders."""

    fault: Fault
    orders: Orders


def job_as_line(job: Job) -> str:
    """A job as a line of JSON."""
    return json.dumps(asdict(job))


def job_of_line(line: str) -> Job:
    """The inverse of `job_as_line`."""
    data = json.loads(line)
    fault, orders = data["fault"], data["orders"]
    edits = tuple(Edit(**edit) for edit in fault.pop("edits"))
    lists = {key: tuple(value) for key, value in fault.items() if isinstance(value, list)}
    witness = orders.pop("witness")
    orders = Orders(**orders, witness=None if witness is None else Witness(**witness))
    return Job(Fault(**(fault | lists), edits=edits), orders)
