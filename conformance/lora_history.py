"""Histories of a table of adapters: a state machine that loads, evicts and runs, against a fresh table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from .lora_cases import LoraCase, LoraSpec
from .properties.lora import HISTORY, LoraLayer, Make, differing_rows
from .strategies import POOLS

SLOTS = 4
SPEC = LoraSpec(5, 40, 24, 3, 2, ranks="mixed", adapted="some_experts", seed=5)
Settle = Callable[[list], None]


def spec_of(device: str) -> LoraSpec:
    """SPEC in the sizes of a device's pools that leave tails, so that it shares kernels with the cases drawn there."""
    pools = POOLS[device]
    hidden, intermediate = pools.shapes[1]
    return replace(SPEC, H=hidden, I=intermediate, M=8 if pools.is_compiled else SPEC.M)


def history_of(case: LoraCase, make: Make, settle: Settle) -> type[RuleBasedStateMachine]:
    """The machine for one case: its adapters, in SLOTS slots, in any order and as often as chance wants.

    Args:
        case: whose adapters are loaded.
        make: the subject's layer.
        settle: takes the verdicts of each batch.
    """

    class History(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.layer: LoraLayer = make(case, SLOTS)
            self.held: dict[int, int] = {}

        @rule(slot=st.integers(0, SLOTS - 1), which=st.integers(0, len(case.adapters) - 1))
        def load(self, slot: int, which: int) -> None:
            self.layer.load(slot, case.adapters[which])
            self.held[slot] = which

        @precondition(lambda self: bool(self.held))
        @rule(data=st.data())
        def evict(self, data: st.DataObject) -> None:
            slot = data.draw(st.sampled_from(sorted(self.held)))
            self.layer.evict(slot)
            del self.held[slot]

        @rule(data=st.data())
        def batch(self, data: st.DataObject) -> None:
            ids = [data.draw(st.sampled_from([-1, *sorted(self.held)])) for _ in range(case.lora_ids.numel())]
            lora_ids = torch.tensor(ids, dtype=torch.int32, device=case.lora_ids.device)
            fresh = make(case, SLOTS)
            for slot, which in self.held.items():
                fresh.load(slot, case.adapters[which])
            stray = differing_rows(case, self.layer.run(lora_ids), fresh.run(lora_ids))
            settle([HISTORY.verdict(not stray, f"{stray} rows differ; slots {self.held}, ids {ids}")])

        @rule()
        def base(self) -> None:
            lora_ids = torch.full_like(case.lora_ids, -1)
            stray = differing_rows(case, self.layer.run(lora_ids), make(case, SLOTS).run(None))
            settle([HISTORY.verdict(not stray, f"{stray} rows of a batch of -1 differ from the layer alone")])

    return History
