"""The search for the grouped GEMM's tiles, and the tuned files that it writes.

For a layer and a number of tokens: each GEMM's candidates are timed alone, the best of both are paired and timed as a
layer, and the best pairs meet the default in an interleaved final. A pair that does not beat the default there by more
than the spread is not believed: the file gets the default's tiles, so that its nearest-key lookup never takes another
number of tokens' tiles where the default is better. After each number of tokens the file is written, whole, under the
name that the lookup reads, and a later run goes on from it.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..impl.experts.kernel_form import KernelForm
from ..impl.fused_moe import fused_experts
from ..impl.platform import Platform
from ..impl.tuning.kernel_config import KernelConfig
from ..impl.tuning.limits import kernel_config
from ..impl.tuning.names import ConfigKey
from ..impl.tuning.schema import TunedConfigError
from ..impl.tuning.writer import read_tuned_file, write_tuned_file
from ..impl.whole_file import folder_locked
from .ahead_of_time import form_of_workload
from .operands import ExpertsCall, WeightBank
from .timer import PairedRatio, Timing
from .tune_candidates import GEMMS, Pair, candidate_configs, default_pair, gemm_candidates
from .tune_device import Bench, CandidateError, InProcess, Plan
from .worker_pool import error_text
from .workloads import Model, Workload

__all__ = ["Trial", "candidate_configs", "measure_pairs", "plan_search", "search", "tune"]

DEFAULT_TOKENS = tuple(2**power for power in range(14))
"""M from 1 to 8,192."""

# Of each GEMM and block_size_m; pairs predicted to be slower than the best by more than the factor are not tried.
_BEST_OF_GEMM, _SLOWER = 3, 1.15
_MOST_PAIRS, _FINALISTS = 12, 4


@dataclass(frozen=True)
class Trial:
    """One candidate's outcome: of a GEMM alone, or of the whole layer.

    Attributes:
        w13: the first GEMM's tile.
        w2: the second GEMM's tile; of a GEMM alone both are its tile.
        timing: seconds of a call; None where it failed.
        error: why it failed, else empty.
        final: whether it was timed interleaved with the other best ones; compare only those closely.
        gemm: which GEMM was timed alone, `w13` or `w2`; empty for the layer.
    """

    w13: KernelConfig
    w2: KernelConfig
    timing: Timing | None = None
    error: str = ""
    final: bool = False
    gemm: str = ""

    @property
    def seconds(self) -> float:
        """The median time of a call, infinite where it failed."""
        return float("inf") if self.timing is None else self.timing.median

    @property
    def pair(self) -> Pair:
        """The tiles of both GEMMs."""
        return self.w13, self.w2

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON holds."""
        return {
            "gemm": self.gemm,
            "w13": self.w13.as_dict(),
            "w2": self.w2.as_dict(),
            "seconds": None if self.timing is None else self.timing.median,
            "error": self.error,
            "final": self.final,
        }


def plan_search(workload: Workload, platform: Platform, limit: int | None = None) -> Plan:
    """The candidates of a workload, the default first.

    Args:
        workload: the layer, its tokens and routing.
        platform: where.
        limit: candidates of each GEMM at most beside the default, drawn with a fixed seed; None: all.
    """

    def drawn(gemm: str) -> tuple[KernelConfig, ...]:
        default, *others = gemm_candidates(workload, gemm, platform)
        if limit is not None and limit < len(others):
            others = random.Random(0).sample(others, limit)
        return (default, *others)

    return Plan(workload, *(drawn(gemm) for gemm in GEMMS))


def measure_pairs(
    workload: Workload,
    pairs: Sequence[Pair],
    *,
    device: torch.device | str = "cpu",
    experts: ExpertsCall | None = None,
    bank: WeightBank | None = None,
    bench: Bench | None = None,
    keep: Pair | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """Time the layer under each pair of tiles, the best ones again and interleaved; a failing pair is recorded.

    Args:
        workload: the layer, its tokens and routing.
        pairs: candidates.
        device: where, unless `bench` says so.
        experts: the layer, unless `bench` says so; it must follow `use_kernel_configs`.
        bank: weights to share with other measurements.
        bench: what measures; None: this process.
        keep: a pair that is in the final however slow it is.
        on_progress: called once a pair.

    Returns:
        A trial for each pair: the finalists, fastest first, then the others, the failures last.
    """
    bench = bench or InProcess(device, experts or fused_experts, bank)
    trials = []
    for pair in dict.fromkeys(pairs):
        try:
            trials.append(Trial(*pair, timing=bench.layer(workload, pair)))
        except Exception as error:  # whatever a candidate raises is its result
            trials.append(Trial(*pair, error=_why(error)))
        on_progress()
    good = sorted((trial for trial in trials if not trial.error), key=lambda trial: trial.seconds)
    finalists = good[:_FINALISTS] + [trial for trial in good[_FINALISTS:] if trial.pair == keep]
    if finalists:
        try:
            timings = bench.final(workload, [trial.pair for trial in finalists])
        except Exception as error:  # none of them can be believed then, and which one is to blame is not known
            failed = [replace(trial, timing=None, error=f"in the final: {_why(error)}") for trial in finalists]
            return [trial for trial in trials if trial not in finalists] + failed
        for trial, timing in zip(finalists, timings, strict=True):
            trials[trials.index(trial)] = replace(trial, timing=timing, final=True)
    return sorted(trials, key=lambda trial: (not trial.final, trial.seconds))


def search(
    workload: Workload,
    candidates: Sequence[KernelConfig] | None = None,
    *,
    device: torch.device | str = "cpu",
    platform: Platform | None = None,
    bench: Bench | None = None,
    plan: Plan | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """Find tiles for both GEMMs: each one's candidates alone, then the best of both as a layer, beside the default.

    Args:
        workload: the layer, its tokens and routing.
        candidates: of both GEMMs; None: those of `plan`.
        device: where, unless `bench` says so.
        platform: what the candidates are for; None: the device's.
        bench: what measures; None: this process.
        plan: candidates of each GEMM; None: all of the grid.
        on_progress: called once a trial.

    Returns:
        The layers' trials as `measure_pairs` gives them, the default among them; then those of the GEMMs alone.
    """
    platform = platform or Platform.of(torch.device(device))
    bench = bench or InProcess(device)
    default = default_pair(workload, platform)
    if candidates is not None:
        plan = Plan(workload, tuple(candidates), tuple(candidates))
    plan = plan or plan_search(workload, platform)
    alone: list[Trial] = []
    seconds: dict[str, dict[KernelConfig, float]] = {}
    for gemm, tile in zip(GEMMS, default, strict=True):
        tiles = list(dict.fromkeys([tile, *plan.candidates(gemm)]))
        if not bench.times_gemms:
            seconds[gemm] = dict.fromkeys(tiles, 0.0)
            continue
        trials = [_time_gemm(bench, workload, gemm, config, on_progress) for config in tiles]
        seconds[gemm] = {
            config: trial.seconds for config, trial in zip(tiles, trials, strict=True) if trial.timing is not None
        }
        alone += trials
    pairs = [default, *_best_pairs(seconds["w13"], seconds["w2"])]
    return [*measure_pairs(workload, pairs, bench=bench, keep=default, on_progress=on_progress), *alone]


def _time_gemm(
    bench: Bench, workload: Workload, gemm: str, config: KernelConfig, on_progress: Callable[[], None]
) -> Trial:
    try:
        return Trial(config, config, timing=Timing((bench.gemm(workload, gemm, config),)), gemm=gemm)
    except Exception as error:  # whatever a candidate raises is its result
        return Trial(config, config, error=_why(error), gemm=gemm)
    finally:
        on_progress()


def _best_pairs(w13: Mapping[KernelConfig, float], w2: Mapping[KernelConfig, float]) -> list[Pair]:
    """Pairs of one block_size_m that may be the fastest, going by the sum of both GEMMs' seconds."""
    sums: dict[Pair, float] = {}
    for block_m in dict.fromkeys(config.block_size_m for config in w13):
        best = [
            sorted((config for config in each if config.block_size_m == block_m), key=lambda config: each[config])
            for each in (w13, w2)
        ]
        for first, second in itertools.product(best[0][:_BEST_OF_GEMM], best[1][:_BEST_OF_GEMM]):
            sums[first, second] = w13[first] + w2[second]
    if not sums:
        return []
    allowed = min(sums.values()) * _SLOWER
    return sorted((pair for pair in sums if sums[pair] <= allowed), key=lambda pair: sums[pair])[:_MOST_PAIRS]


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, CandidateError) else error_text(error)


@dataclass(frozen=True)
class Tuned:
    """What a search gave for one workload.

    Attributes:
        workload: the layer, its tokens and routing.
        pair: the tiles to use: the best ones, or the default's where nothing beat it.
        default: the default's tiles.
        default_seconds: the default's median in the final; None where it failed.
        best: the fastest pair of the final.
        best_seconds: its median.
        ratio: best over default, round by round; None where the default failed, or is the best.
        trials: everything that was tried.
    """

    workload: Workload
    pair: Pair
    default: Pair
    default_seconds: float | None
    best: Pair
    best_seconds: float
    ratio: PairedRatio | None
    trials: tuple[Trial, ...]

    @property
    def is_better(self) -> bool:
        """Whether something other than the default is to be used."""
        return self.pair != self.default

    @property
    def failed(self) -> tuple[Trial, ...]:
        """Candidates that could not be measured, or were wrong."""
        return tuple(trial for trial in self.trials if trial.error)

    def about(self) -> dict[str, Any]:
        """What the tuned file says of this entry; microseconds of a call of the layer."""
        return {
            "model": self.workload.model.name,
            "routing": str(self.workload.routing),
            "candidates": len({(trial.gemm, trial.pair) for trial in self.trials}),
            "failed": len(self.failed),
            "best_us": round(self.best_seconds * 1e6, 2),
            "default_us": None if self.default_seconds is None else round(self.default_seconds * 1e6, 2),
            "taken": "best" if self.is_better else "default",
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON holds, with every trial."""
        return {
            **self.about(),
            "num_tokens": self.workload.num_tokens,
            "dtype": self.workload.dtype,
            "workload": self.workload.id,
            "w13": self.pair[0].as_dict(),
            "w2": self.pair[1].as_dict(),
            "ratio": None if self.ratio is None else vars(self.ratio),
            "trials": [trial.as_dict() for trial in self.trials],
        }


def decide(workload: Workload, trials: Sequence[Trial], default: Pair) -> Tuned | None:
    """Which tiles to use: those of the fastest finalist, if it beats the default by more than the spread.

    The spread is the distance between the quartiles of the rounds' ratios. Where the default itself failed, the
    fastest wins.

    Returns:
        None where no pair got through the final.
    """
    finals = [trial for trial in trials if trial.final]
    if not finals:
        return None
    best = min(finals, key=lambda trial: trial.seconds)
    own = next((trial for trial in finals if trial.pair == default), None)
    pair, ratio = best.pair, None
    if own is not None and own is not best and own.timing is not None and best.timing is not None:
        ratio = PairedRatio.of(best.timing, own.timing)
        if 1 - ratio.median <= ratio.high - ratio.low:
            pair = default
    seconds = None if own is None else own.seconds
    return Tuned(workload, pair, default, seconds, best.pair, best.seconds, ratio, tuple(trials))


@dataclass
class TunedFileOfLayer:
    """One layer's tuned file, as far as it is known.

    Attributes:
        folder: where it is.
        key: what it is for, which gives its name.
        triton_version: the version it is tuned with; what another version's file says is not taken over.
        entries: tiles for each number of tokens.
        about: how they were found, likewise.
        device: the device's name.
    """

    folder: Path
    key: ConfigKey
    triton_version: str
    device: str
    entries: dict[int, Pair] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where it is, or will be."""
        return self.folder / self.key.file_name

    def load(self) -> None:
        """Take over what the file on disk says, where it is of the same Triton version.

        Raises:
            TunedConfigError: it breaks the schema.
        """
        found = read_tuned_file(self.path)
        if found is None:
            return
        document = json.loads(self.path.read_text(encoding="utf-8"))
        if document.get("triton_version") != self.triton_version:
            return
        for tokens, (w13, w2) in found.entries.items():
            try:
                self.entries[tokens] = (kernel_config(w13), kernel_config(w2))
            except ValueError as error:
                raise TunedConfigError(self.path, str(tokens), str(error)) from error
        about = document.get("about")
        said = about.get("tokens") if isinstance(about, dict) else None
        self.about |= said if isinstance(said, dict) else {}

    def add(self, tuned: Tuned) -> None:
        """Write the file with one more entry, beside those that other processes have written since.

        Raises:
            OSError: the folder cannot be written.
            TunedConfigError: somebody has broken the file since it was read.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_locked(self.folder):
            self.load()
            self._add(tuned)

    def _add(self, tuned: Tuned) -> None:
        tokens = tuned.workload.num_tokens
        self.entries[tokens] = tuned.pair
        self.about[str(tokens)] = tuned.about()
        about = {
            "tool": "moegate tune",
            "device": self.device,
            "torch": torch.__version__,
            "unit": "microseconds of a call of the layer, medians of an interleaved final",
            "tokens": {key: self.about[key] for key in sorted(self.about, key=int)},
        }
        write_tuned_file(self.folder, self.key, self.entries, triton_version=self.triton_version, about=about)


@dataclass
class TuneRun:
    """What a run gave.

    Attributes:
        tuned: for each workload that was measured, what came out.
        kept: workloads that the files had already.
        failed: workloads of which nothing could be measured, with the reason.
        left: workloads for which there was no time.
        files: the files written.
    """

    tuned: list[Tuned] = field(default_factory=list)
    kept: list[Workload] = field(default_factory=list)
    failed: list[tuple[Workload, str]] = field(default_factory=list)
    left: list[Workload] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


class Watcher:
    """Hears how a run goes; does nothing with it."""

    def plan(self, steps: int) -> None:
        """So many steps are to come in all, going by what is known now."""

    def step(self) -> None:
        """One is done."""

    def phase(self, what: str) -> None:
        """This is done now."""

    def done(self, tuned: Tuned) -> None:
        """A workload is tuned, and written."""


def unsearchable(model: Model) -> str | None:
    """Why no tiles are searched for a model's layer, in words; None where they are.

    The search judges each GEMM beside plain ones, with silu between them.
    """
    if model.activation != "silu":
        return f"tiles are searched for layers with silu, it has {model.activation}"
    return "tiles are searched for layers without biases" if model.has_bias else None


def layer_key(workload: Workload, platform: Platform) -> ConfigKey:
    """The key of the tuned file that this layer looks for on this platform.

    Raises:
        ValueError: a device without a name, for which no file is ever looked for.
    """
    model, stored = workload.model, workload.format
    key = ConfigKey.of_layer(
        num_local_experts=model.local_experts,
        intermediate_size=model.intermediate_size,
        hidden_size=model.hidden_size,
        top_k=model.top_k,
        dtype=stored.activations,
        scheme=stored.scheme,
        block_shape=stored.block_shape,
        platform=platform,
    )
    if key is None:
        raise ValueError("device: expected one with a name, which names the file")
    return key


def tune(
    workloads: Sequence[Workload],
    *,
    bench: Bench,
    platform: Platform,
    folder: Path,
    triton_version: str,
    minutes: float | None = None,
    limit: int | None = None,
    again: bool = False,
    watcher: Watcher | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TuneRun:
    """Tune workloads and write their files, each number of tokens as soon as it is known.

    First come the numbers of tokens at which the layer runs on the general kernels where nobody asks for a form, in the
    order in which they are given. At the others the tiles are for those who ask for these kernels. With a time limit
    each layer gets an equal share of what is left; what a layer does not need goes to those after it, and at the end to
    those that were cut short.

    Args:
        workloads: what to tune; a model's are measured together.
        bench: what measures.
        platform: the device's, whose name the files bear.
        folder: where the files are written.
        triton_version: of the kernels; a file of another version is begun anew.
        minutes: after which no workload is begun; None: no limit.
        limit: candidates of each GEMM at most.
        again: measure also what the files have.
        watcher: hears how it goes.
        clock: seconds since any moment, `time.monotonic`'s where `bench` compiles.

    Raises:
        TunedConfigError: a file that is there already breaks the schema.
        OSError: the folder cannot be written.
    """
    watcher = watcher or Watcher()
    end = float("inf") if minutes is None else clock() + 60 * minutes
    run = TuneRun()
    # Layers that look for the same file are one: the first one's numbers of tokens are taken.
    layers: dict[ConfigKey, dict[int, Workload]] = {}
    for workload in workloads:
        layers.setdefault(layer_key(workload, platform), {}).setdefault(workload.num_tokens, workload)
    files = {key: TunedFileOfLayer(folder, key, triton_version, platform.name) for key in layers}
    todo: dict[ConfigKey, list[Workload]] = {}
    plans: dict[Workload, Plan] = {}
    for key, by_tokens in layers.items():
        files[key].load()
        known = {} if again else files[key].entries
        run.kept += [workload for tokens, workload in by_tokens.items() if tokens in known]
        todo[key] = [workload for tokens, workload in by_tokens.items() if tokens not in known]
        plans |= {workload: plan_search(workload, platform, limit) for workload in todo[key]}
    if not plans:
        return run

    steps = {w: len(plan.w13) + len(plan.w2) + _MOST_PAIRS + 1 for w, plan in plans.items()}
    watcher.plan(bench.steps(list(plans.values())) + sum(steps.values()))
    watcher.phase("compiling")
    bench.prepare(list(plans.values()), until=end, on_done=watcher.step)

    is_general = {w: form_of_workload(w, platform).form is KernelForm.GENERAL for w in plans}
    for runs_them, is_last_round in itertools.product((True, False), (False, True)):
        for position, key in enumerate(todo):
            now = clock()
            until = end if is_last_round else now + (end - now) / (len(todo) - position)
            for workload in [w for w in todo[key] if is_general[w] is runs_them]:
                if clock() >= until:
                    break
                todo[key].remove(workload)
                tuned = _tune_one(workload, plans[workload], bench, platform, run, watcher)
                if tuned is not None:
                    files[key].add(tuned)
                    run.files = list(dict.fromkeys([*run.files, files[key].path]))
                    watcher.done(tuned)
    run.left = [workload for several in todo.values() for workload in several]
    return run


def _tune_one(
    workload: Workload, plan: Plan, bench: Bench, platform: Platform, run: TuneRun, watcher: Watcher
) -> Tuned | None:
    watcher.phase(f"{workload.model.name} M={workload.num_tokens}")
    trials = search(workload, platform=platform, bench=bench, plan=plan, on_progress=watcher.step)
    # Fewer pairs than planned: the steps count as done.
    for _ in range(len(plan.w13) + len(plan.w2) + _MOST_PAIRS + 1 - len(trials)):
        watcher.step()
    tuned = decide(workload, trials, default_pair(workload, platform))
    if tuned is None:
        reasons = list(dict.fromkeys(trial.error for trial in trials if trial.error))
        run.failed.append((workload, reasons[0] if reasons else "no candidate"))
    else:
        run.tuned.append(tuned)
    return tuned
