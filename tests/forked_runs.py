"""Runs of pytest in processes of their own, forked from one that has imported what is heavy: as a program.

It reads {name: arguments} as JSON, and writes {name: exit code}; what a run says goes to the file NAME.txt beside it.
No module of moegate is loaded before the fork, so that a run loads its plugins as always.
"""

import gc
import json
import os
import sys
from importlib import import_module
from pathlib import Path

HEAVY = ("torch", "triton", "hypothesis", "scipy.stats", "safetensors.torch")
# Of which every subject of transformers loads the most.
TRANSFORMERS = ("transformers.models.qwen3_moe.modeling_qwen3_moe",)


def start(name, arguments, texts):
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        stream = os.open(os.path.join(texts, f"{name}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.argv = ["pytest", *arguments]
        code = int(import_module("pytest").main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main():
    runs, texts, at_a_time, *more = json.load(sys.stdin), sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
    for module in (*HEAVY, *more):
        import_module(module)
    gc.freeze()  # what is here now is garbage in none of them, so that none looks through it
    assert not [name for name in sys.modules if name.partition(".")[0] == "moegate"]
    waiting, running, codes = list(runs), {}, {}
    while waiting or running:
        while waiting and len(running) < at_a_time:
            name = waiting.pop(0)
            running[start(name, runs[name], texts)] = name
        pid, status = os.wait()
        codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
    print(json.dumps(codes))


def run_forked(runs, folder, environment, *, texts=None, at_a_time=2, more=()):
    """Exit code and output of each run.

    Args:
        runs: arguments of pytest by name.
        folder: in which they run.
        environment: of all of them.
        texts: the folder into which this writes; None: the one in which they run.
        at_a_time: how many.
        more: modules to import before the fork beside those that any run imports.
    """
    import subprocess

    texts = Path(texts or folder)
    done = subprocess.run(
        [sys.executable, __file__, str(texts), str(at_a_time), *more],
        input=json.dumps({name: [*map(str, arguments)] for name, arguments in runs.items()}),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: (code, (texts / f"{name}.txt").read_text())
        for name, code in json.loads(done.stdout.splitlines()[-1]).items()
    }


if __name__ == "__main__":
    main()
