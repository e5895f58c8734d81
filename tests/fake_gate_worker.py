"""A side's process for tests of the gate: it answers as `moegate.bench.gate.worker` does, from a file in its tree.

It imports neither torch nor Triton, so a whole gate run takes a second. `behaviour.json` in the current folder:
`seconds` of a call, `noise` (relative, of each process and of each turn), `warms` (how much slower the device becomes,
within some ten turns of either side), `mhz` and `most_mhz`, `busy`, and by name of an operation and model what happens
instead: an answer, or `die`, `hang` or `fail`.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

from moegate.bench.gate.process import serve

BEHAVIOUR = json.loads(Path("behaviour.json").read_text())
# Another noise for each process, but the same in each run of the tests.
DRAW = random.Random(f"{Path.cwd().name} {Path('calls.log').stat().st_size}")
OFFSET = 1 + DRAW.gauss(0, BEHAVIOUR.get("noise", 0.001))


def planned(operation, model):
    with Path("calls.log").open("a") as log:
        log.write(f"{operation} {model}\n")
    action = BEHAVIOUR.get(operation, {}).get(model)
    match action:
        case "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(60)
        case "fail":
            raise RuntimeError(f"no {model} here")
    return action


def hello():
    return {"machine": {"device": "fake"}, "most_mhz": BEHAVIOUR.get("most_mhz")}


def busy():
    return {"busy": BEHAVIOUR.get("busy", "")}


def check(workload):
    right = {"holds": True, "budget_used": 0.5, "paths": {}, "kernels": {}, "calls": 4, "copies": 1, "cold": True}
    answer = planned("check", workload["model"])
    return right if answer is None else {**right, **answer}


def prepare(workload, calls, copies):
    global model
    model = workload["model"]
    planned("prepare", model)
    return {"method": "host", "took": {"operands": 0.1, "capture": 0.1, "verify": 0.1}}


def pace():
    planned("pace", model)
    return {"seconds": 1e-3}


def inject(levels, asked):
    planned_reached = (planned("inject", model) or {}).get("reached", {})
    reached = {str(level): level for level in levels} | planned_reached
    injected = [level for level in levels if reached[str(level)] == level]
    return {"reached": reached, "injected": injected, "asked": {str(level): level for level in injected}}


def block(passes, level=""):
    action = planned("block", model)
    slower = BEHAVIOUR.get("slower", {}).get(model, 0.0) + (float(level) if level else 0.0)
    if warms := BEHAVIOUR.get("warms"):
        turns = Path("calls.log").read_text().rpartition("pace")[2].count("block")
        slower = (1 + slower) * (1 + warms * (1 - math.exp(-turns / 10))) - 1
    drawn = OFFSET * (1 + DRAW.gauss(0, BEHAVIOUR.get("noise", 0.001))) * (1 + slower)
    return {"seconds": BEHAVIOUR.get("seconds", 1e-3) * drawn, "mhz": (action or {}).get("mhz", BEHAVIOUR.get("mhz"))}


model = ""
serve(int(sys.argv[1]), int(sys.argv[2]), {f.__name__: f for f in (hello, busy, check, prepare, pace, inject, block)})
