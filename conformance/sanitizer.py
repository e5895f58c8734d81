"""compute-sanitizer over a fixed subset of the suite: `python -m moegate.conformance.sanitizer`.

The cases of `sanitized.py` run in child processes under memcheck (memory that is not the kernel's), racecheck (shared
memory without a barrier), initcheck (memory that nobody wrote) and synccheck (barriers that not all threads reach).
What a tool prints is parsed and named by case and kernel. Before it, memcheck must find a write that is planted:
a tool that sees nothing proves nothing.

Exit codes: 0 clean, 1 findings or violated properties, 2 inconclusive (a time limit, a tool that failed or is blind),
3 nothing could be done here (no tool, no GPU, a device that the tool does not support), 4 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
HOLDS, FINDING, INCONCLUSIVE, NOTHING_DONE, BAD_ARGUMENTS = range(5)
# As `sanitized.py` prints it; that module is not imported here, because it needs Triton in another mode.
MARK = "moegate case: "
PLANTED = "planted_kernel"
# What the tool makes the exit code of a child in which it found something.
FOUND = 86
_PREFIX = re.compile(r"^=========(?: (.*))?$")
# How the first line of a finding begins, by what it is.
_KINDS = (
    ("invalid access", re.compile(r"Invalid (?:__\w+__ )?(?:read|write|atomic|access|memory)", re.IGNORECASE)),
    ("race", re.compile(r"(?:Error|Warning): Race reported", re.IGNORECASE)),
    ("race", re.compile(r"(?:ERROR|WARN(?:ING)?): Potential \w+ hazard", re.IGNORECASE)),
    ("uninitialised read", re.compile(r"Uninitialized .*(?:read|access)", re.IGNORECASE)),
    ("copy of uninitialised memory", re.compile(r"Host API memory access error", re.IGNORECASE)),
    ("barrier", re.compile(r"Barrier error|Divergent thread", re.IGNORECASE)),
    ("error of the driver", re.compile(r"Program hit |Unspecified launch failure", re.IGNORECASE)),
    ("leak", re.compile(r"Leaked [0-9,]+ bytes", re.IGNORECASE)),
    ("unused memory", re.compile(r"Unused memory in allocation", re.IGNORECASE)),
)
# What says that the tool itself did not do its work.
_UNSUPPORTED = re.compile(r"Device not supported|not supported on this (?:device|GPU|platform)", re.IGNORECASE)
_FAILED = re.compile(
    r"Internal Sanitizer Error|"
    r"Error: (?:Failed|Cannot|Unable|No attachable process|Target application terminated before)",
    re.IGNORECASE,
)
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazards? displayed)", re.IGNORECASE)
# "at kernel(float*)+0x120 in file.py:14", and as older releases have it: "at 0x120 in file.cu:14:kernel(float*)".
_ARGUMENTS = r"(?:<[^>]*>)?(?:\([^)]*\))?"
_AT = re.compile(rf"\bat (?P<kernel>[A-Za-z_]\w*){_ARGUMENTS}\+0x[0-9a-f]+(?: in (?P<where>\S+))?")
_AT_OLD = re.compile(rf"\bat 0x[0-9a-f]+ in (?:(?P<where>\S+?:\d+):)?(?P<kernel>[A-Za-z_]\w*){_ARGUMENTS}(?: \[.*\])?$")


@dataclass(frozen=True)
class SanitizerFinding:
    """One thing that a tool found.

    Attributes:
        tool: which.
        case: that ran when it did.
        kind: in words.
        kernel: whose code it is; empty where the tool does not say.
        where: file and line, where the tool knows.
        text: what the tool says of it, without the host's frames.
    """

    tool: str
    case: str
    kind: str
    kernel: str
    where: str
    text: str

    def __str__(self) -> str:
        """A line for people."""
        place = (f" in {self.kernel}" if self.kernel else "") + (f" ({self.where})" if self.where else "")
        return f"{self.tool}: {self.kind}{place}, case {self.case!r}: {self.text}"


@dataclass
class Parsed:
    """What a tool's output says.

    Attributes:
        findings: in the order in which they came.
        unsupported: the line that says the tool does not work on this device; empty where it does.
        failed: the line that says the tool did not do its work; empty where it did.
        cases: that began.
        violated: properties that do not hold, with their case.
    """

    findings: list[SanitizerFinding] = field(default_factory=list)
    unsupported: str = ""
    failed: str = ""
    cases: list[str] = field(default_factory=list)
    violated: list[str] = field(default_factory=list)


def parse(output: str, tool: str) -> Parsed:
    """Read what a child and the tool around it printed.

    A finding that this does not know the form of still counts, by the tool's own summary.
    """
    parsed, case, group, announced = Parsed(), "before the first case", [], 0

    def close() -> None:
        finding = _finding(group, tool, case)
        if finding is not None:
            parsed.findings.append(finding)
        group.clear()

    for line in output.splitlines():
        match = _PREFIX.match(line.rstrip())
        if match is None:
            close()
            if line.startswith(MARK):
                case = line.removeprefix(MARK).strip()
                parsed.cases.append(case)
            parsed.violated += _violated(line)
            continue
        text = match.group(1) or ""
        parsed.unsupported = parsed.unsupported or (text.strip() if _UNSUPPORTED.search(text) else "")
        parsed.failed = parsed.failed or (text.strip() if _FAILED.search(text) else "")
        summary = _SUMMARY.search(text)
        if summary is not None:
            announced += int(summary.group(1) or summary.group(2))
        if not text.strip() or summary is not None:
            close()
            continue
        if group and not text.startswith("  ") and any(sign.match(text.strip()) for _, sign in _KINDS):
            close()
        group.append(text)
    close()
    if announced and not parsed.findings:
        words = f"{announced} errors in the tool's summary, in a form that is not known here"
        parsed.findings.append(SanitizerFinding(tool, "unknown", "unknown", "", "", words))
    return parsed


def _finding(group: Sequence[str], tool: str, case: str) -> SanitizerFinding | None:
    """What a group of lines says; None where it is no finding."""
    first = next((line.strip() for line in group), "")
    kind = next((name for name, sign in _KINDS if sign.match(first)), None)
    if kind is None:
        return None
    kernel = where = ""
    told = []
    for line in map(str.strip, group):
        if line.startswith(("Saved host backtrace", "Host Frame", "Device Frame")):
            break
        told.append(line)
        match = _AT.search(line) or _AT_OLD.search(line)
        if match is not None and not kernel:
            kernel, where = match.group("kernel"), match.group("where") or ""
    return SanitizerFinding(tool, case, kind, kernel, Path(where).name if where else "", "; ".join(told))


def _violated(line: str) -> list[str]:
    if not line.startswith('{"case"'):
        return []
    try:
        row = json.loads(line)
        return [f"{row['case']} ({row['variant']}): {text}" for text in row["violated"]]
    except (json.JSONDecodeError, KeyError, TypeError):
        return []


# --- Running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        output: both streams.
        status: its exit status; None where its time was over.
        seconds: that it took.
    """

    output: str
    status: int | None
    seconds: float


Run = Callable[[Sequence[str], dict[str, str], float], Ended]


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is: on the path, or where the CUDA toolkit puts it; None where it is not."""
    found = shutil.which("compute-sanitizer")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [Path(home, "bin", "compute-sanitizer") for home in homes if home]
    return found or next((str(place) for place in places if os.access(place, os.X_OK)), None)


def why_not() -> str:
    """Why nothing can be done here; empty where it can."""
    import torch

    if find_sanitizer() is None:
        return "compute-sanitizer is not installed: it comes with the CUDA toolkit"
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    return "compute-sanitizer knows NVIDIA's GPUs alone" if torch.version.hip else ""


def run_child(command: Sequence[str], environment: dict[str, str], seconds: float) -> Ended:
    """Run a child with a time limit; it and what it started are ended when the limit is over."""
    started = time.monotonic()
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, status = child.communicate(timeout=seconds)[0], child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)
        output, status = child.communicate()[0], None
    return Ended(output, status, time.monotonic() - started)


def command_of(
    sanitizer: str, tool: str, subjects: Sequence[str], *, caching: bool = False, planted: bool = False
) -> list[str]:
    """A child under a tool."""
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND), "--print-limit", "20"]
    named = [word for subject in subjects for word in ("--subject", subject)]
    mine = ["--planted"] if planted else [*named, *(["--caching"] if caching else [])]
    return [sanitizer, *options, sys.executable, "-m", "moegate.conformance.sanitized", *mine]


def environment_of(*, caching: bool) -> dict[str, str]:
    """A child's: kernels are compiled with their lines, and each tensor is an allocation of its own.

    PyTorch hands out parts of large blocks, within which a tool cannot see one tensor's end.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "0"}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "0" if caching else "1"
    if caching:
        del environment["PYTORCH_NO_CUDA_MEMORY_CACHING"]
    return environment


@dataclass
class Outcome:
    """What came of all tools.

    Attributes:
        findings: of all.
        violated: properties that did not hold under a tool.
        inconclusive: why some tool proves nothing.
        unsupported: why a tool cannot work here, by tool.
        cases: how many ran under each tool.
        seconds: for each tool.
        again: why a tool was run once more, by tool.
    """

    findings: list[SanitizerFinding] = field(default_factory=list)
    violated: list[str] = field(default_factory=list)
    inconclusive: list[str] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)
    cases: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    again: dict[str, str] = field(default_factory=dict)

    @property
    def code(self) -> int:
        """The exit code."""
        if self.findings or self.violated:
            return FINDING
        if self.inconclusive:
            return INCONCLUSIVE
        # A tool that works nowhere proves nothing, and one of several that does not is a hole.
        return NOTHING_DONE if self.unsupported and not self.cases else INCONCLUSIVE if self.unsupported else HOLDS

    def add(self, other: Outcome) -> None:
        """Merge another tool's."""
        self.findings += other.findings
        self.violated += other.violated
        self.inconclusive += other.inconclusive
        for name in ("unsupported", "cases", "seconds", "again"):
            getattr(self, name).update(getattr(other, name))

    def as_dict(self) -> dict[str, object]:
        """Plain data."""
        return {"schema": "moegate-sanitizer/1", "code": self.code} | asdict(self)


def prove(sanitizer: str, seconds: float, run: Run = run_child) -> Outcome:
    """Let memcheck find a planted write; what comes of it is inconclusive where it does not."""
    command = command_of(sanitizer, "memcheck", (), planted=True)
    ended = run(command, environment_of(caching=False), seconds)
    parsed = parse(ended.output, "memcheck")
    if parsed.unsupported:
        return Outcome(unsupported={"memcheck": parsed.unsupported})
    if any(PLANTED in finding.kernel and finding.kind == "invalid access" for finding in parsed.findings):
        return Outcome()
    how = f"its time of {seconds:g} s was over" if ended.status is None else f"it ended with {ended.status}"
    return Outcome(inconclusive=[f"memcheck does not see a planted write: {how}{_tail(ended.output)}"])


def check(sanitizer: str, tool: str, subjects: Sequence[str], seconds: float, run: Run = run_child) -> Outcome:
    """Run the cases under one tool."""
    outcome = Outcome(seconds={tool: 0.0})
    for caching in (False, True):
        left = seconds - outcome.seconds[tool]
        ended = run(command_of(sanitizer, tool, subjects, caching=caching), environment_of(caching=caching), left)
        outcome.seconds[tool] = round(outcome.seconds[tool] + ended.seconds, 1)
        parsed = parse(ended.output, tool)
        if parsed.unsupported:
            outcome.unsupported[tool] = parsed.unsupported
            break
        outcome.findings += parsed.findings
        outcome.violated += [f"{tool}: {text}" for text in parsed.violated]
        outcome.cases[tool] = outcome.cases.get(tool, 0) + len(parsed.cases)
        last = f" in case {parsed.cases[-1]!r}" if parsed.cases else " before the first case"
        if ended.status is None:
            outcome.inconclusive.append(f"{tool}: its time of {seconds:g} s was over{last}")
            break
        if parsed.failed:
            outcome.inconclusive.append(f"{tool}: {parsed.failed}{last}")
        elif ended.status not in (0, 1, FOUND) or (ended.status and not (parsed.findings or parsed.violated)):
            outcome.inconclusive.append(f"{tool}: ended with {ended.status}{last}{_tail(ended.output)}")
        elif not caching and not parsed.cases:
            outcome.inconclusive.append(f"{tool}: ran no case{_tail(ended.output)}")
    return outcome


def check_all(
    sanitizer: str, tools: Sequence[str], subjects: Sequence[str], seconds: float, run: Run = run_child
) -> Outcome:
    """The proof, then the tools side by side; a device that no tool supports ends it at once.

    A tool that proved nothing beside the others (their processes share the device's memory) is run once more, alone.
    """
    outcome = prove(sanitizer, seconds, run)
    if outcome.unsupported or outcome.inconclusive:
        return outcome
    # Each has its process and hardly any use for the device's width.
    with ThreadPoolExecutor(max(1, len(tools))) as pool:
        every = list(pool.map(lambda tool: check(sanitizer, tool, subjects, seconds, run), tools))
    for tool, found in zip(tools, every, strict=True):
        if found.code == INCONCLUSIVE and not found.unsupported:
            alone = check(sanitizer, tool, subjects, seconds, run)
            alone.seconds[tool] += found.seconds[tool]
            alone.again[tool] = found.inconclusive[0]
            outcome.add(alone)
        else:
            outcome.add(found)
    return outcome


def _tail(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return ": " + " | ".join(lines[-3:])[-400:] if lines else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m moegate.conformance.sanitizer", description=__doc__)
    parser.add_argument(
        "--subject",
        action="append",
        help="implementation under test: a name, or FILE.py:CLASS; may be repeated (default: moegate in each form)",
    )
    parser.add_argument("--tools", default=",".join(TOOLS), help="some of them, with commas between")
    parser.add_argument("--timeout", type=float, default=240.0, metavar="S", help="seconds for each tool")
    parser.add_argument("--json", metavar="FILE", help="write what came of it")
    try:
        asked = parser.parse_args(arguments)
    except SystemExit as ended:
        return BAD_ARGUMENTS if ended.code else HOLDS
    tools = asked.tools.split(",")
    unknown = [tool for tool in tools if tool not in TOOLS]
    if unknown or not 0 < asked.timeout < math.inf:
        said = f"--tools: expected some of {', '.join(TOOLS)}, got {asked.tools!r}" if unknown else ""
        print(said or f"--timeout: expected a number above 0, got {asked.timeout}", file=sys.stderr)
        return BAD_ARGUMENTS
    reason, sanitizer = why_not(), find_sanitizer()
    if reason or sanitizer is None:
        print(f"nothing was checked: {reason}", file=sys.stderr)
        return NOTHING_DONE
    outcome = check_all(sanitizer, tools, asked.subject or (), asked.timeout)
    report(outcome)
    if asked.json:
        Path(asked.json).write_text(json.dumps(outcome.as_dict(), indent=1) + "\n")
    return outcome.code


def report(outcome: Outcome) -> None:
    """Print what came of it."""
    for tool, seconds in outcome.seconds.items():
        found = sum(finding.tool == tool for finding in outcome.findings)
        print(f"{tool}: {outcome.cases.get(tool, 0)} cases, {found} findings, {seconds:.0f} s")
    for tool, text in outcome.again.items():
        print(f"{tool} was run again, alone, after this: {text}")
    for text in (*outcome.findings, *(f"violated: {text}" for text in outcome.violated)):
        print(text)
    for text in (*outcome.inconclusive, *(f"{tool}: {text}" for tool, text in outcome.unsupported.items())):
        print(f"inconclusive: {text}")
    words = {HOLDS: "clean", FINDING: "findings", INCONCLUSIVE: "inconclusive", NOTHING_DONE: "nothing was checked"}
    print(f"verdict: {words[outcome.code]}")


if __name__ == "__main__":
    sys.exit(main())
