"""Fleets whose processes can be harmed: one started for it, or one that runs already."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import dsml_gpu
from dsml_gpu.chaos.proxy import Network
from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.errors import DsmlError, InvalidValue, PeerUnavailable

#: By then a server that was started, or woken up, must be of use.
COMES_WITHIN_S = 20.0
_POLL_S = 0.02


class NoVictim(DsmlError):
    """There is no process left that may be harmed."""


class Target(Protocol):
    """A fleet as trials see it.

    Attributes:
        client: connected to its coordinator.
    """

    client: dsml_gpu.Client

    def members(self, nranks: int, orders: Mapping[int, str]) -> list[int]:
        """Ids of devices that can be used, in the order of ranks.

        Args:
            orders: of the ranks that may be harmed, the fault that each is to have by itself (`failpoints.parse`), without
                its condition on the device; empty: none.

        Raises:
            NoVictim, PeerUnavailable: there are not as many.
        """

    def fired_s(self, device_id: int) -> float | None:
        """When the ordered fault happened, by `time.monotonic`; None: it did not."""

    def signal(self, device_id: int, number: int) -> None:
        """Sends a signal to its process. Raises NoVictim where that has ended."""

    def repair(self, device_id: int) -> None:
        """A device that may be dead, or has an order, is to be of use again when it is needed."""


def wait_until(holds: Callable[[], bool], what: str, limit_s: float = COMES_WITHIN_S) -> float:
    """Returns after how many seconds something holds. Raises PeerUnavailable where it does not in time."""
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > limit_s:
            raise PeerUnavailable(f"{what}: not within {limit_s:g} s")
        threading.Event().wait(_POLL_S)
    return time.monotonic() - started


def reachable(client: dsml_gpu.Client) -> dict[int, str]:
    """For each device that the coordinator can use, what tells its process from the one before it."""
    return {device.device_id: device.metadata.processUid for device in client.devices()}


class _Slot:
    """One device's place: an id and an address, and the processes that have had them, one after the other."""

    def __init__(self, device_id: int) -> None:
        self.device_id = device_id
        self.server: ServerProcess | None = None
        self.port = 0
        self.log: Path | None = None
        self.harmed = False
        self.known_uid = ""  # of a process that is gone

    @property
    def address(self) -> str:
        """host:port of its server; empty: it does not listen yet."""
        return getattr(self.server, "address", "")


class OwnFleet:
    """A coordinator, and device servers that register with it, started for the trials. Ends with `stop` or ``with``.

    A device server that dies is started anew with the same id and address when it is needed.

    Args:
        ndevices: device ids are 1..ndevices.
        device_options, coordinator_options: further command line options.
        state: the coordinator has a file for its state.
        cut: device servers are behind proxies, and no memory is shared.
        log: file that gets what the servers say; None: nobody hears it.

    Attributes:
        client: connected to the coordinator.
        network: the proxies; None: there are none.
    """

    def __init__(
        self,
        ndevices: int,
        device_options: Sequence[str] = (),
        coordinator_options: Sequence[str] = (),
        *,
        state: bool = False,
        cut: bool = False,
        log: Path | None = None,
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._device_options = tuple(device_options)
        try:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            self._errors = self._stack.enter_context((log or Path(os.devnull)).open("ab"))
            options = ["--state", str(self._folder / "state")] if state else []
            self._coordinator_options = ("coordinator", "--embedded", "0", *coordinator_options, *options)
            self._stack.callback(self._stop_devices)
            self._slots = {device_id: _Slot(device_id) for device_id in range(1, ndevices + 1)}
            self.coordinator = ServerProcess(*self._coordinator_options, errors=self._errors)
            self._stack.callback(lambda: self.coordinator.stop())
            self.network: Network | None = None
            if cut:
                self.network = Network()
                self._stack.callback(self.network.close)
            for slot in self._slots.values():
                self._start(slot)
            self.client = self._stack.enter_context(dsml_gpu.connect(self.address))
            for slot in self._slots.values():
                self._await(slot)
        except BaseException:
            self._stack.close()
            raise

    @property
    def address(self) -> str:
        """host:port of the coordinator."""
        return self.coordinator.address

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by what the processes are."""
        devices = {f"device {slot.device_id}": slot.server.process.pid for slot in self._slots.values() if slot.server}
        return {"coordinator": self.coordinator.process.pid, **devices}

    # ---- `Target` -----------------------------------------------------------------------------------------------------

    def members(self, nranks: int, orders: Mapping[int, str]) -> list[int]:
        if nranks > len(self._slots):
            raise InvalidValue(f"{nranks} ranks were asked for, the fleet has {len(self._slots)} devices")
        chosen = list(self._slots)[:nranks]
        for rank, device_id in enumerate(chosen):
            slot = self._slots[device_id]
            ordered = orders.get(rank, "")
            if slot.harmed or ordered:
                self._end(slot)
                self._start(slot, ordered)
        for device_id in chosen:
            self._await(self._slots[device_id])
        return chosen

    def fired_s(self, device_id: int) -> float | None:
        log = self._slots[device_id].log
        if log is None or not log.exists():
            return None
        return log.stat().st_mtime - time.time() + time.monotonic()

    def signal(self, device_id: int, number: int) -> None:
        server = self._slots[device_id].server
        if server is None or server.process.poll() is not None:
            raise NoVictim(f"device {device_id} has no process any more")
        server.process.send_signal(number)

    def repair(self, device_id: int) -> None:
        self._slots[device_id].harmed = True

    # ---- more than that -----------------------------------------------------------------------------------------------

    def join(self) -> int:
        """Starts one more device server; returns its device's id when it can be used."""
        slot = self._slots[max(self._slots) + 1] = _Slot(max(self._slots) + 1)
        self._start(slot)
        self._await(slot)
        return slot.device_id

    def leave(self, device_id: int) -> int:
        """Ends a device server in order (SIGTERM); returns its exit status. Its place is gone then."""
        slot = self._slots.pop(device_id)
        assert slot.server is not None
        slot.server.process.send_signal(signal.SIGTERM)
        return slot.server.stop()

    def replace(self, device_id: int) -> None:
        """Ends what a device has for a process, and starts another one; returns when it can be used."""
        slot = self._slots[device_id]
        self._end(slot)
        self._start(slot)
        self._await(slot)

    def kill_coordinator(self) -> None:
        """As kill -9, and starts another one at the same address; returns when it listens."""
        port = int(self.address.rpartition(":")[2])
        self.coordinator.kill()
        for stream in (self.coordinator.process.stdin, self.coordinator.process.stdout):
            assert stream is not None
            stream.close()
        self.coordinator = ServerProcess(*self._coordinator_options, port=port, errors=self._errors)

    def stop(self) -> None:
        """Ends all processes. Idempotent."""
        self._stack.close()

    def __enter__(self) -> OwnFleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, slot: _Slot, order: str = "") -> None:
        options = ["device", "--id", str(slot.device_id), *self._device_options]
        slot.log = None
        if order:
            # Of this device: after a loss the ranks have other numbers.
            slot.log = self._folder / f"faults-{time.monotonic_ns()}"
            text = f"{order}{',' if '@' in order else '@'}device={slot.device_id}"
            options += ["--failpoint", text, "--failpoint-log", str(slot.log)]
        slot.harmed = bool(order)
        if self.network is None:
            options += ["--coordinator", self.address]
            slot.server = ServerProcess(*options, wait=False, port=slot.port, errors=self._errors)
            return
        # As if it were on a host of its own: without short cuts, by which it would be reached all the same.
        options += ["--host", f"127.1.0.{slot.device_id}", "--no-share-memory", "--no-lane"]
        here = f"127.2.0.{slot.device_id}"
        inward = self.network.proxy(here, lambda: slot.address, slot.device_id)
        outward = self.network.proxy(here, lambda: self.address, slot.device_id)
        options += ["--coordinator", outward, "--advertise", inward]
        slot.server = ServerProcess(*options, wait=False, errors=self._errors)
        self.network.belongs(slot.server.process.pid, slot.device_id)

    def _end(self, slot: _Slot) -> None:
        """Kills what is there; returns when it is gone."""
        if slot.server is None:
            return
        slot.known_uid = reachable(self.client).get(slot.device_id, slot.known_uid)
        slot.server.kill()
        slot.server.stop()
        slot.server = None

    def _await(self, slot: _Slot) -> None:
        assert slot.server is not None
        if not slot.address:
            slot.server.wait_until_ready()
            slot.port = int(slot.address.rpartition(":")[2])
        wait_until(
            lambda: reachable(self.client).get(slot.device_id, slot.known_uid) != slot.known_uid,
            f"device {slot.device_id} can be used",
        )

    def _stop_devices(self) -> None:
        servers = [slot.server for slot in self._slots.values() if slot.server is not None]
        for server in servers:
            with contextlib.suppress(ProcessLookupError):
                server.process.send_signal(signal.SIGCONT)
        for server in servers:
            server.kill()  # in order it would wait for a coordinator that is gone
            server.stop()


class RunningFleet:
    """A fleet that runs already, whose processes are on this host. Its devices are not started anew when they die.

    Args:
        coordinator: host:port.
        pids: process ids by device id: those that may be harmed.
    """

    def __init__(self, coordinator: str, pids: Mapping[int, int]) -> None:
        self.client = dsml_gpu.connect(coordinator)
        self._pids = dict(pids)

    def members(self, nranks: int, orders: Mapping[int, str]) -> list[int]:
        for order in filter(None, orders.values()):
            raise InvalidValue(f"a process that runs already cannot be told to have the fault {order!r}")
        victim = next(iter(orders), 0)
        there = list(reachable(self.client))
        victims = [device_id for device_id in there if device_id in self._pids]
        others = [device_id for device_id in there if device_id not in victims]
        if not victims:
            raise NoVictim("no device is left that may be harmed")
        if len(there) < max(2, nranks):
            raise NoVictim(f"{max(2, nranks)} devices are needed, {len(there)} are left")
        chosen = [*others, *victims[1:]][: nranks - 1]
        return [*chosen[:victim], victims[0], *chosen[victim:]]

    def fired_s(self, device_id: int) -> float | None:
        return None

    def signal(self, device_id: int, number: int) -> None:
        try:
            os.kill(self._pids[device_id], number)
        except ProcessLookupError:
            raise NoVictim(f"device {device_id} has no process {self._pids[device_id]} any more") from None

    def repair(self, device_id: int) -> None:
        """Whoever started it may start it anew; until then it is not listed as reachable."""

    def stop(self) -> None:
        """Closes the connection. Idempotent."""
        self.client.close()

    def __enter__(self) -> RunningFleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
