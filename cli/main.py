"""The command line: `moegate check | explain | doctor | bench | gate | ...`."""

from __future__ import annotations

import signal
from typing import NoReturn

import typer

from moegate import __version__, exit_codes

app = typer.Typer(
    name="moegate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Whether a Mixture-of-Experts layer still computes the right thing, the right way, as fast as before.",
)


# A command line that cannot be understood: click's own code for it, 2, means inconclusive here. typer exports only this
# one of the errors' classes; all derive from its base.
typer.BadParameter.__mro__[1].exit_code = exit_codes.BAD_ARGUMENTS


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moegate {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Property-testing conformance and speed gate for Mixture-of-Experts layers."""


def _mount() -> None:
    # Each command is a file of its own; none of them imports torch before it runs.
    from moegate import bench_command, check, doctor, explain, faults, gate, history, report, tune

    app.command("check")(check.check)
    app.command("explain")(explain.explain)
    app.command("faults")(faults.faults)
    # The benchmarks' own parser reads these options, as it does under `python -m moegate.bench`.
    raw = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command("bench", context_settings=raw)(bench_command.bench)
    app.command("gate")(gate.gate)
    app.command("doctor")(doctor.doctor)
    app.command("tune")(tune.tune)
    app.add_typer(history.app, name="history")
    app.command("report")(report.report)


_mount()


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def run() -> None:
    """Console entry point."""
    # Time limits of CI, and `timeout`, end a process by SIGTERM: it says what it had, as when somebody interrupts it.
    signal.signal(signal.SIGTERM, _interrupt)
    app()
