"""What needs no clock, on any machine: launches a layer, the path, bytes over bytes needed, registers and spills."""

from __future__ import annotations

import pytest

from moegate.bench.gate import snapshot
from moegate.bench.gate.record import Change
from moegate.bench.plugin import DONE


@pytest.fixture(scope="module")
def changes(pytestconfig: pytest.Config) -> list[Change]:
    """What differs from the checked-in file; nothing once it is written anew."""
    now = snapshot.current()
    if pytestconfig.getoption("moegate_guards_accept"):
        if snapshot.INTERPRETED:
            raise pytest.UsageError(
                "--moegate-guards-accept: expected TRITON_INTERPRET unset, since kernels are compiled"
            )
        snapshot.write(now)
    return snapshot.differences(snapshot.stored(), now)


@pytest.mark.parametrize(
    "what", ["backend", "assignment", "launches", "bytes", "refusal", "registers", "spills", "workload"]
)
def test_guard(what: str, changes: list[Change], pytestconfig: pytest.Config) -> None:
    if snapshot.INTERPRETED and what in ("registers", "spills"):
        pytest.skip("kernels are interpreted in this process (TRITON_INTERPRET), so none is compiled")
    pytestconfig.stash[DONE] = pytestconfig.stash.get(DONE, 0) + 1
    worse = [f"{each.where}: {each.base} -> {each.head}" for each in changes if each.what == what and each.fails]
    if worse:
        pytest.fail(
            f"{what} got worse:\n" + "\n".join(worse) + "\n(--moegate-guards-accept takes it, if it is meant)",
            pytrace=False,
        )
