"""`moegate bench`: the layers of real models, timed on the device beside their floors.

The file is not called bench.py: `moegate.bench` is a room.
"""

from __future__ import annotations

import typer


def bench(context: typer.Context) -> None:
    """Time models' layers, beside peers if given; `moegate bench --help` lists the options.

    Exit codes: 0 measured, 1 something is wrong, 3 nothing measured, 4 bad arguments.
    """
    from moegate.bench.__main__ import main

    raise typer.Exit(main(context.args))
