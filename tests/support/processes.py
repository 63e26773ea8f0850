"""The command ``dsml-gpu`` as a process, for tests of the process itself; all others use `dsml_gpu.cli.fleet`."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

COMMAND = (sys.executable, "-m", "dsml_gpu")
#: A process that has not ended by then hangs.
END_TIMEOUT_S = 20.0


@dataclass
class Running:
    """A server that has said where it listens.

    Attributes:
        ready_line: what it said.
        errors: where its standard error goes.
    """

    process: subprocess.Popen[str]
    ready_line: str
    address: str
    errors: Path

    @property
    def stderr(self) -> str:
        return self.errors.read_text()

    def ends(self, number: signal.Signals | None = None) -> int:
        """Sends it a signal, or none, and returns the exit status that it ends with."""
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(END_TIMEOUT_S)


@contextmanager
def running(
    folder: Path, *arguments: str, stdin: int | IO[str] = subprocess.DEVNULL, command: Sequence[str] = COMMAND
) -> Iterator[Running]:
    """A server for the length of a block, which may end it before; its standard error is printed, for failures.

    Args:
        folder: takes a file.
        arguments: a command and its options; ``--port 0`` unless they name one.
        command: runs them.
    """
    if "--port" not in arguments:
        arguments = (*arguments, "--port", "0")
    errors = folder / f"stderr-{time.monotonic_ns()}"
    with errors.open("w") as stderr:
        process = subprocess.Popen([*command, *arguments], stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert process.stdout is not None
        ready_line = process.stdout.readline()
        match = re.search(r"listening on (\S+)", ready_line)
        assert match, f"{' '.join(arguments)} did not start"
        yield Running(process, ready_line, match[1], errors)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        sys.stderr.write(errors.read_text())


def run_to_end(
    *arguments: str,
    stdin: int | IO[str] = subprocess.DEVNULL,
    command: Sequence[str] = COMMAND,
    timeout_s: float = END_TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Runs a command that is expected to end by itself."""
    return subprocess.run(
        [*command, *arguments], stdin=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Polls until something holds that happens in another process and that nobody tells; fails when it never does."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s:g} s"
        time.sleep(0.01)
