"""Runs of pytest in processes of their own, forked from one that has imported what is heavy: as a program.

It reads {name: arguments} as JSON, and writes {name: exit code}; what a run says goes to the file NAME.txt beside it.
No module of moegate is loaded before the fork, so that a run loads its plugins as always.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

HEAVY = ("torch", "triton", "hypothesis", "scipy.stats", "safetensors.torch", "transformers")


def start(name, arguments):
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        stream = os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.argv = ["pytest", *arguments]
        code = int(import_module("pytest").main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main():
    runs, at_a_time = json.load(sys.stdin), int(sys.argv[1])
    for module in HEAVY:
        import_module(module)
    assert not [name for name in sys.modules if name.partition(".")[0] == "moegate"]
    waiting, running, codes = list(runs), {}, {}
    while waiting or running:
        while waiting and len(running) < at_a_time:
            name = waiting.pop(0)
            running[start(name, runs[name])] = name
        pid, status = os.wait()
        codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
    print(json.dumps(codes))


def run_forked(runs, folder, environment, at_a_time=2):
    """Exit code and output of each run.

    Args:
        runs: arguments of pytest by name.
        folder: in which they run, and into which this writes.
        environment: of all of them.
        at_a_time: how many.
    """
    import subprocess

    done = subprocess.run(
        [sys.executable, __file__, str(at_a_time)],
        input=json.dumps({name: list(arguments) for name, arguments in runs.items()}),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: (code, (Path(folder) / f"{name}.txt").read_text())
        for name, code in json.loads(done.stdout.splitlines()[-1]).items()
    }


if __name__ == "__main__":
    main()
