"""Bad values of every option of the command line, and what must stand beside an option for it to be looked at."""

from __future__ import annotations

LONG = "9" * 5000
JSON = ("", ".", "no/such/folder/file.json", "a\0b", "x" * 300, "file.json/below", "\x1b[2J/x.json")
_INT = ("much", "", "1.5", "nan", "1e3", LONG)
_COUNT = (*_INT, "0", "-1", "-9223372036854775809")
_NUMBER = ("much", "", "nan", "inf", "-inf", "0", "-1", "1,5")
_NAME = ("", "nosuch", "\x1b[31mred", "../../etc/passwd", "a b", "a\nb")
NAMES = _NAME[1:]

STORES = ("no/such/folder", "file.json", "a\0b")
# What is asked for is looked up: a name that nothing has finds nothing.
_FILTERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("--device", "--model", "--routing", "--dtype", "--subject"), ()),
    "--tokens": _INT,
}

# By command and option, values that must be refused. What a child of the command refuses takes seconds: one of each.
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "check": {
        "--subject": ("nosuch.py:Subject",),
        "--device": _NAME,
        "--profile": _NAME,
        "--workers": (*_INT, "-1", "100000", LONG),
        "--scale": _NUMBER,
        "--minutes": _NUMBER,
        "--reruns": (*_COUNT, "1000001"),
        "--spec": ("__import__('os').abort()", "", "AlignSpec(M=1)", "x" * 20_000),
        "--select": ("not (",),
        "--known": ("", "no/such.toml", ".", "list.json", "a\0b"),
        "--timeout": _NUMBER,
        "--subject-python": ("no/such/python", "a\0b"),
        "--emit-repro": ("", ".", "file.json", "no/such/folder/repro.py", "a\0b"),
        "--json": JSON,
        "--junit": JSON,
        "--markdown": JSON,
    },
    "explain": {
        "--platform": (*_NAME, "cuda", "cuda:1.0", "cuda:9", "rocm:gfx1", "cpu:0", f"cuda:{LONG}.0"),
        "--dtype": _NAME,
        "--block-shape": (*_NAME, "128", "128,128,128", "128,", "-1,128", "1.5,128", "128,100", f"{LONG},128"),
        "--activation": _NAME,
        "--dp": _COUNT,
        "--ep": (*_COUNT, "129"),
        "--tp": (*_COUNT, "5"),
        "--experts": _COUNT,
        "--top-k": (*_COUNT, "129"),
        "--hidden": _COUNT,
        "--intermediate": _COUNT,
        "--backend": _NAME[1:],
        "--without": _NAME,
        "--json": JSON,
    },
    "tune": {
        "--model": _NAME,
        "--shape": (*_NAME, "E=8", "E=8,N=64,H=64", "E=0,N=64,H=64,top_k=2", "E=8,N=64,H=64,top_k=9", f"E={LONG},N=1"),
        "--tokens": (*_NAME, "0", "-1", "1,,2", "1.5", LONG, "1;2"),
        "--dtype": (*_NAME, "fp8-channel", "fp8_w8a8", "int4-g128"),
        "--device": ("", "nosuch", "cpu:x", "\x1b[31m", "meta"),
        "--minutes": _NUMBER,
        "--limit": _COUNT,
        "--output": ("file.json", "a\0b", "file.json/below"),
        "--json": JSON,
    },
    "doctor": {"--json": JSON},
    "faults": {
        "--area": _NAME,
        "--select": ("nosuch", "\x1b[31mred"),
        "--catalogue": ("no/such.toml", ".", "list.json", "a\0b"),
        "--device": _NAME,
        "--mutate": (*_INT, "-1"),
        "--quickest": (*_INT, "-1"),
        "--seed": _INT,
        "--scale": _NUMBER,
        "--workers": (*_INT, "-1"),
        "--resume": (".", "no/such/folder/journal.jsonl", "a\0b"),
        "--json": JSON,
    },
    "gate": {
        "--base": ("", "nosuch", "-x", "\x1b[31m", "a..b", "--help"),
        "--head": ("", "nosuch", "-x", "\x1b[31m"),
        "--base-tree": ("no/such/folder", "file.json", "a\0b"),
        "--head-tree": ("no/such/folder", "file.json", "a\0b"),
        "--subject": ("", "\x1b[31m"),
        "--prepare": (),
        "--threshold": ("", "much", "nan", "inf", "-1", "a=much", "=", "x=-1"),
        "--accept": ("", " ", "\x1b[31m"),
        "--models": _NAME,
        "--tokens": (*_NAME, "0", "-1", "1,,2", LONG),
        "--routing": (*_NAME, "zipf", "zipf-1"),
        "--dtype": _NAME,
        "--device": ("nosuch", "cpu:x", "\x1b[31m", "meta"),
        "--minutes": _NUMBER,
        "--pairs": _COUNT,
        "--again": (*_INT, "-1"),
        "--rounds": (*_COUNT, "3"),
        "--seed": _INT,
        "--levels": ("much", "nan", "inf", "-1", "1,,2"),
        "--json": JSON,
        "--markdown": JSON,
    },
    "report": {
        "--output": (".", "a\0b", "file.json/below.html"),
        "--store": ("no/such/folder", "file.json", "a\0b"),
        **dict.fromkeys(("--gate", "--check", "--faults"), ("no/such.json", ".", "empty.json", "list.json", "a\0b")),
        "--json": JSON,
    },
    "history add": {
        "--store": ("file.json", "a\0b"),
        "--exit-code": _INT,
        "--repo": ("no/such/folder", "a\0b"),
        "--json": JSON,
    },
    "history list": {**_FILTERS, "--store": STORES, "--commit": (), "--limit": _COUNT, "--json": JSON},
    "history compare": {**_FILTERS, "--store": STORES, "--json": JSON},
    "history changes": {
        **_FILTERS,
        "--store": STORES,
        "--min-change": ("much", "nan", "-1", "inf"),
        "--max-p": ("much", "nan", "-1", "2", "inf"),
        "--fail-recent": (*_INT, "-1"),
        "--newest": _COUNT,
        "--json": JSON,
    },
    "history promote": {
        "--store": STORES,
        "--device": (),
        "--main": ("-x", "\x1b[31m"),
        "--repo": ("no/such/folder", "a\0b"),
        "--json": JSON,
    },
    "history rebuild": {"--store": STORES, "--json": JSON},
    "bench": {
        "--subject": ("nosuch.py:Subject", "\x1b[31m"),
        "--models": _NAME,
        "--tokens": (*_NAME, "0", "-1", "1,,2", "1.5", LONG),
        "--routing": (*_NAME, "zipf", "zipfx", "zipf-1", "zipfnan", "zipfinf"),
        "--dtype": _NAME,
        "--device": ("nosuch", "cpu:x", "\x1b[31m", "meta"),
        "--peer": (*_NAME, "nosuch.py:f", "file.json:nosuch"),
        "--budget": _NUMBER,
        "--lora": (*_COUNT, "257"),
        "--adapters": _COUNT,
        "--simulate-ep": (*_NAME, "1", "0", "-1", "257", "2,,4", LONG),
        "--link-bandwidth": _NUMBER,
        "--link-latency": ("much", "", "nan", "inf", "-1"),
        "--json": JSON,
    },
}
# What else must be there for an option to be looked at.
BESIDE = {
    ("check", "--minutes"): ("--profile", "soak"),
    ("tune", "--model"): (),
    ("tune", "--shape"): (),
    ("bench", "--simulate-ep"): ("--link-bandwidth", "400", "--link-latency", "10"),
    ("bench", "--link-bandwidth"): ("--simulate-ep", "2", "--link-latency", "10"),
    ("bench", "--link-latency"): ("--simulate-ep", "2", "--link-bandwidth", "400"),
    ("bench", "--adapters"): ("--lora", "16"),
}
# How messages may call an option besides.
ALSO_CALLED = {
    ("check", "--select"): ("'-k'",),
    ("explain", "--dp"): ("dp_size",),
    ("explain", "--ep"): ("ep_size",),
    ("explain", "--tp"): ("tp_size",),
    ("explain", "--experts"): ("num_experts",),
    ("explain", "--hidden"): ("hidden_size",),
    ("explain", "--intermediate"): ("intermediate_size",),
    ("bench", "--link-bandwidth"): ("link-bandwidth",),
    ("bench", "--link-latency"): ("link-latency",),
    ("bench", "--simulate-ep"): ("simulate-ep",),
    ("bench", "--models"): ("model",),
    ("gate", "--models"): ("model",),
    ("gate", "--routing"): ("exponent",),
    ("bench", "--lora"): ("rank",),
    ("bench", "--routing"): ("exponent",),
}
COMMON = {
    "check": ("--device", "cpu", "-n", "1"),
    "tune": ("--model", "qwen3-30b-a3b"),
    "bench": ("--models", "qwen3-30b-a3b", "--tokens", "1", "--device", "cpu"),
    "gate": ("--base-tree", ".", "--models", "qwen3-30b-a3b", "--tokens", "1", "--device", "cpu"),
    "history add": ("file.json",),
    "history compare": ("latest",),
}
