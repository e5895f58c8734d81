"""What the report is made of in tests: a history with known changes, a gate, a conformance report, planted faults."""

from history_runs import H200, commit_id, noisy, record, stored

from moegate.bench.history.store import Store

COMMITS = 30
STEP_AT = 18
HOSTILE = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"


def fill_history(folder):
    """Two GPU models, two models, two routings; M = 8 of one is 5 % slower from commit STEP_AT on."""
    store = Store(folder)
    for number in range(COMMITS):
        late = number >= STEP_AT
        records = [
            record(noisy(46e-6 * (1.05 if late else 1), number)),
            record(noisy(31e-6, 100 + number), num_tokens=1),
            record(noisy(190e-6, 200 + number), num_tokens=512),
            record(noisy(52e-6 * (0.97 if number >= 9 else 1), 300 + number), routing="zipf1.2"),
            record(noisy(88e-6, 400 + number), model="mixtral-8x7b"),
        ]
        stored(store, *records, commit=number, time=number)
        stored(store, record(noisy(70e-6, 500 + number), device="NVIDIA H100"), commit=number, time=number)
    (folder / "runs" / "notes.txt").write_text("remember")


def gate_record(**changes):
    """A gate's JSON, with a row of each kind."""
    parts = {"model": "qwen3-30b-a3b", "routing": "uniform-s0", "dtype": "bf16", "cache_state": "cold"}
    empty = dict.fromkeys(("base_seconds", "head_seconds", "change", "low", "high", "p_value", "adjusted", "can_see"))

    def row(number, state, verdict, change=None, **more):
        times = {} if change is None else {
            "base_seconds": 46e-6, "head_seconds": 46e-6 * (1 + change), "change": change, "low": change - 0.004,
            "high": change + 0.004, "can_see": 0.011,
        }  # fmt: skip
        name = {"workload": f"qwen3-30b-a3b-M{number}", "num_tokens": number, "state": state, "verdict": verdict}
        return {**parts, **empty, **name, "why": "", "threshold": 0.01, "changes": [], **times, **more}

    lost = {"what": "assignment", "where": "", "base": "naive", "head": "aligned", "fails": True, "accepted": False}
    return {
        "schema": "moegate-gate/1",
        "verdict": "regression",
        "exit_code": 1,
        "why": ["1 workload is slower by 1 % or more"],
        "base": {"revision": "main", "commit": commit_id(3), "dirty": False, "commit_time": "", "subject": "moegate"},
        "head": {"revision": "HEAD", "commit": commit_id(4), "dirty": False, "commit_time": "", "subject": "moegate"},
        "device": H200,
        "machine": {},
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 200.0,
        "clock": True,
        "can_see": 0.011,
        "plan": {},
        "workloads": [
            row(1, "timed", "SLOWER", 0.04, why="its interval excludes 1 %", changes=[lost]),
            row(8, "timed", "SAME", 0.001),
            row(64, "timed", "FASTER", -0.03),
            row(512, "missing", None, why="the head can no longer run it"),
        ],
        "changes": [],
        "notes": ["the harness of the head was carried to the base"],
        **changes,
    }


def check_report():
    """A conformance report's JSON: a property that holds, one that is violated, and a known failure."""
    found = f"ROUTE-03: {HOSTILE}"
    names = ("id", "sentence", "cases", "budget_used", "budget_used_median", "verdict", "finding", "replay")
    rows = [
        ("NUM-01", "every element is within its error budget", 4000, 0.41, 0.12, "holds", None, None),
        ("NUM-02", "the RMS error of every row is within its budget", 4000, "inf", 0.1, "known", None, None),
        ("ROUTE-03", "a row's ids are distinct", 1200, None, None, "violated", found, "moegate check --spec here"),
    ]
    known = {"issue": "https://example.org/1", "property": "NUM-02", "state": "tolerated", "cases": 3}
    return {
        "schema": 2,
        "verdict": "violated",
        "subject": "mine",
        "device": "cuda",
        "profile": "gate",
        "executions": 5200,
        "properties": [dict(zip(names, row, strict=True)) for row in rows],
        "feature_pairs": {"declared": 100, "run": 90},
        "not_judged": [],
        "stale": [],
        "known_failures": [known],
    }


def faults_report():
    """The JSON of planted faults: one of a matrix, one found by a hunt, one that survives, one not planted."""
    kills = {"NUM-01": [4, 6], "NUM-03": [1, 6], "META-02": [0, 5]}
    return {
        "schema": 1,
        "score": 2 / 3,
        "faults": [
            {
                "id": "gate-up-swapped",
                "area": "activation",
                "killed": True,
                "by": ["NUM-01"],
                "cases": 4,
                "kills": kills,
            },
            {"id": "tie-rule-lost", "area": "routing", "killed": True, "by": ["ROUTE-05"], "cases": 9},
            {"id": "scale-twice", "area": "quant", "killed": False, "by": None, "cases": 650},
        ],
        "not_hunted": [{"id": "graph-stale", "area": "graph", "why": "there is no GPU here"}],
    }
