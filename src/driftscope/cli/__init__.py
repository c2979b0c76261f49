"""The command line. Every workflow rule calls it, and so can a person.

Exit codes: 0 holds, 1 does not hold, 2 bad input.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from driftscope.cli.commands import app
from driftscope.cli.contracts import contracts
from driftscope.cli.convert import convert
from driftscope.cli.diff import diff
from driftscope.cli.faultbench import faultbench
from driftscope.cli.inspect import inspect
from driftscope.cli.stages import stage
from driftscope.cli.traces import compare, replay, trace
from driftscope.errors import InputError

for command in (inspect, diff, convert, trace, compare, replay):
    app.command()(command)
app.add_typer(stage, name="stage")
app.add_typer(contracts, name="contracts")
app.add_typer(faultbench, name="faultbench")


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        _note_failure(str(error))
        sys.stderr.write(f"driftscope: {error}\n")
        sys.exit(2)


def _note_failure(line: str) -> None:
    """Leave the line for `driftscope run`, which sees its rules' exit codes only through Snakemake."""
    file = os.environ.get("DRIFTSCOPE_FAILURES")
    if file:
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
