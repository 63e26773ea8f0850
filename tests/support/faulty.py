"""The command ``dsml-gpu`` with faults that are ordered (`dsml_gpu.failpoints`)."""

from __future__ import annotations

import sys
from pathlib import Path

_START = """
import sys
from pathlib import Path
from dsml_gpu import failpoints
failpoints.order(failpoints.parse(sys.argv.pop(1), Path(sys.argv.pop(1))))
from dsml_gpu.cli.main import main
main()
"""


def command_with(fault: str, log: Path) -> tuple[str, ...]:
    """The command that has a fault; `log` gets a line when it happens.

    Args:
        fault: as `failpoints.parse` takes it.
    """
    return sys.executable, "-c", _START, fault, str(log)
