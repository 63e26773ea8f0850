"""Coordinators that are killed, and those that come after them."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.coordinator.journal import open_journal
from dsml_gpu.coordinator.records import Recovered
from tests.support.faulty import command_with
from tests.support.processes import COMMAND, Running, running


class Coordinators:
    """One coordinator after the other, at one port, over the same devices.

    Attributes:
        state: file of their journal; None: they forget all.
        now: the present one.
    """

    def __init__(self, folder: Path, devices: Sequence[ServerProcess], state: Path | None, *options: str) -> None:
        self._folder = folder
        self.state = state
        self._options = [option for device in devices for option in ("--device", device.address)]
        self._options += [*options, *(["--state", str(state)] if state else [])]
        self._processes = ExitStack()
        self._faults = folder / "faults"
        self.now: Running
        self.port = "0"

    @property
    def address(self) -> str:
        return self.now.address

    @property
    def faults(self) -> str:
        """The faults that have happened."""
        return self._faults.read_text() if self._faults.exists() else ""

    def start(self, fault: str = "") -> None:
        """Starts the next one.

        Args:
            fault: that it is to have.
        """
        command = command_with(fault, self._faults) if fault else COMMAND
        options = [*self._options, "--port", self.port]
        self.now = self._processes.enter_context(running(self._folder, "coordinator", *options, command=command))
        self.port = self.address.rpartition(":")[2]

    def kill(self) -> None:
        self.now.process.kill()
        self.now.process.wait()

    def ends(self) -> None:
        """Waits for the end that a fault brings it."""
        assert self.now.ends() == -signal.SIGKILL

    def stop(self) -> None:
        self._processes.close()

    def journal(self) -> Recovered:
        """What the journal has, when no coordinator has it."""
        with closing(open_journal(self.state)) as journal:
            return journal.load()
