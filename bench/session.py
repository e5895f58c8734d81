"""A run over many workloads: weights shared within a model, ceilings measured once, failures kept beside results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..impl.fused_moe import fused_experts
from .floor import H200_PUBLISHED, Ceilings, measure_ceilings
from .formats import find_format
from .lora import lora_contenders
from .operands import ExpertsCall, WeightBank, make_operands
from .peers import load_peer
from .record import Record
from .runner import Measurement, expect_right, measure_workload
from .verification import Verify, verify_by_budget
from .workloads import LoraOptions, Workload

OURS = "moegate"
EXIT_MEASURED, EXIT_WRONG, EXIT_NOTHING, EXIT_BAD_ARGUMENTS = 0, 1, 3, 4


class LayerBench:
    """What the workloads of one run share.

    Args:
        device: where.
        peers: `path/to/file.py:callable`, or an installed engine's name, each.
        ours: what is measured; None: `fused_experts`.
        name: of what is measured.
        fixed_ceilings: use the fixed H200 ceilings instead of measuring this device's.
        budget: seconds of samples for each workload.
        verify: judges ours.
        lora: adapters whose cost is timed beside the layer; None without.

    Raises:
        ValueError: a peer that cannot be loaded, or two of one name.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        peers: Sequence[str] = (),
        ours: ExpertsCall | None = None,
        name: str = OURS,
        fixed_ceilings: bool = False,
        budget: float = 0.6,
        verify: Verify = verify_by_budget,
        lora: LoraOptions | None = None,
    ) -> None:
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.ours = fused_experts if ours is None else ours
        self.name = name
        self.subjects: dict[str, ExpertsCall] = {name: self.ours}
        for reference in peers:
            peer, call = load_peer(reference)
            if peer in self.subjects:
                raise ValueError(f"peer: expected a name of its own, got {peer!r} twice")
            self.subjects[peer] = call
        self._fixed_ceilings, self._budget, self._verify = fixed_ceilings, budget, verify
        self._ceilings: dict[str, Ceilings] = {}
        self._bank: WeightBank | None = None
        self._lora = lora

    def ceilings(self, dtype: str) -> Ceilings:
        """The device's ceilings for a workload's dtype, measured when first asked for."""
        if self._fixed_ceilings:
            return H200_PUBLISHED
        peak = find_format(dtype).peak
        if peak not in self._ceilings:
            self._ceilings[peak] = measure_ceilings(self.device, [peak])
        return self._ceilings[peak]

    def measure(self, workload: Workload) -> Measurement:
        """Time ours and the peers; raises as `measure_workload` does."""
        # Before weights take the memory that the ceilings' buffers need.
        ceilings = self.ceilings(workload.dtype)
        bank = self._weights(workload)
        lora = {} if self._lora is None else lora_contenders(workload, self._lora, bank)
        return measure_workload(
            workload,
            self.subjects | lora,
            device=self.device,
            ceilings=ceilings,
            verify=self._verify,
            bank=bank,
            budget=self._budget,
        )

    def check(self, workload: Workload) -> None:
        """Verify ours on a workload without timing it.

        Raises:
            WrongKernelError: it is wrong.
        """
        verdict = self._verify(self.ours, make_operands(workload, self._weights(workload), call=0, weight_copy=0))
        expect_right(self.name, "its result", verdict)

    def _weights(self, workload: Workload) -> WeightBank:
        if self._bank is None or not self._bank.serves(workload, self.device):
            self._bank = None  # the last model's weights go before the next one's are made
            self._bank = WeightBank(workload.model, workload.format, self.device)
        return self._bank


@dataclass(frozen=True)
class Run:
    """What a run gave.

    Attributes:
        records: of every contender that was timed.
        failures: (workload id, subject, reason) of those that were wrong or raised.
        skipped: (workload id, reason) of those that cannot be.
        ours: the name of what is measured, beside peers.
    """

    records: tuple[Record, ...]
    failures: tuple[tuple[str, str, str], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    ours: str = OURS

    @property
    def exit_code(self) -> int:
        """1 where ours failed on a workload, else 3 where nothing was timed, else 0; a peer's failure is none."""
        if any(subject == self.ours for _, subject, _ in self.failures):
            return EXIT_WRONG
        return EXIT_MEASURED if self.records else EXIT_NOTHING


def run_workloads(
    bench: LayerBench,
    workloads: Sequence[Workload],
    progress_console: Console | None = None,
    unsupported: Callable[[Workload], str | None] = lambda workload: workload.unsupported,
) -> Run:
    """Time every workload, with a progress bar; what fails is kept, and the rest goes on.

    Args:
        bench: what to time, and where.
        workloads: with a model's together, since its weights are kept for the next workload only.
        progress_console: where the bar goes; None: none.
        unsupported: why a workload cannot be, in words; None where it can.
    """
    records: list[Record] = []
    failures: list[tuple[str, str, str]] = []
    skipped: list[tuple[str, str]] = []
    with progress_bar(progress_console) as progress:
        task = progress.add_task("timing", total=len(workloads))
        for workload in workloads:
            progress.update(task, description=f"{workload.model.name} M={workload.num_tokens}")
            try:
                if why := unsupported(workload):
                    skipped.append((workload.id, why))
                    continue
                measured = bench.measure(workload)
            except Exception as error:
                failures.append((workload.id, bench.name, f"{type(error).__name__}: {error}"))
            else:
                records += measured.records
                failures += [(workload.id, name, reason) for name, reason in measured.failures.items()]
            finally:
                progress.advance(task)
    return Run(tuple(records), tuple(failures), tuple(skipped), bench.name)


def progress_bar(console: Console | None) -> Progress:
    """A bar that goes when it is full; None shows none."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console or Console(quiet=True), transient=True)
