"""A coordinator as a running server: in a process of its own, or in a thread of somebody else's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from dsml_gpu.coordinator.embedded import DeviceService, EmbeddedDevices, TransferSettings
from dsml_gpu.coordinator.journal import open_journal
from dsml_gpu.coordinator.records import KnownServer
from dsml_gpu.coordinator.registry import DeviceRegistry
from dsml_gpu.coordinator.service import CoordinatorService
from dsml_gpu.coordinator.settings import CoordinatorSettings
from dsml_gpu.memory.backend import NUMPY, Backend
from dsml_gpu.wire.lane import LaneServer
from dsml_gpu.wire.server import RpcServer
from dsml_gpu.wire.stubs import DEFAULT_MAX_MESSAGE_BYTES
from dsml_gpu.wire.trim import RegularTrim

#: Embedded devices that a coordinator without configured ones makes on demand.
DEFAULT_EMBEDDED_LIMIT = 1024
#: Address space of an embedded device.
DEFAULT_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class CoordinatorConfig:
    """Everything a coordinator is started with.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        devices: host:port of device servers.
        embedded: this many devices in the coordinator's process from the start. None: none beside configured devices,
            and without those as many as are asked for, up to `DEFAULT_EMBEDDED_LIMIT`.
        memory_bytes: address space of each embedded device.
        backends: where embedded devices have their memory; they take them in turn.
        max_message_bytes: larger messages are refused.
        state: file with what it must not forget, made where there is none; None: it forgets all when it ends.
    """

    host: str = "127.0.0.1"
    port: int = 50052
    devices: tuple[str, ...] = ()
    embedded: int | None = None
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    backends: tuple[Backend, ...] = (NUMPY,)
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    state: Path | None = None
    settings: CoordinatorSettings = field(default_factory=CoordinatorSettings)
    transfers: TransferSettings = field(default_factory=TransferSettings)

    @property
    def embedded_limit(self) -> int:
        if self.embedded is not None:
            return self.embedded
        return 0 if self.devices else DEFAULT_EMBEDDED_LIMIT


class CoordinatorServer:
    """Starts and stops a coordinator. All calls come from one event loop."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self.config = config
        self.rpc = RpcServer(config.host, config.port, config.max_message_bytes)
        self._trim = RegularTrim()

    @property
    def address(self) -> str:
        """host:port for clients."""
        return self.rpc.address

    async def start(self) -> None:
        """Takes the port, makes the embedded devices, asks the configured ones who they are, goes on with the communicators
        of the coordinator before, and serves.

        Raises:
            PortInUse: the address cannot be listened on.
            InvalidValue: two device servers have the same device id.
            JournalUnusable: the file of `CoordinatorConfig.state` is in use, damaged, or of a newer version.
        """
        config = self.config
        self.rpc.bind()
        self._journal = open_journal(config.state)
        for address in config.devices:
            self._journal.put_server(KnownServer(address, registered=False))
        # Embedded devices are peers of others: they are reached at the coordinator's own address.
        devices = self._devices = DeviceService(self.rpc.address, config.transfers)
        self._embedded = EmbeddedDevices(devices, config.embedded_limit, config.memory_bytes, config.backends)
        self.registry = DeviceRegistry(
            config.devices, self._embedded, config.settings.stall_timeout_s, config.settings.detection
        )
        await self.registry.start(config.embedded or 0)
        self._service = CoordinatorService(self.registry, config.settings, self._journal)
        await self._service.resume()
        self._lane = LaneServer(self._service, "GPUCoordinator")
        await self._lane.start()
        self._service.lane = self._lane.name
        servicers = {"GPUCoordinator": self._service, "GPUDevice": devices}
        await self.rpc.start(servicers, config.settings.stall_timeout_s)
        self._trim.start()

    async def stop(self, drain_s: float = 10.0) -> None:
        """Drains, takes leave of all devices, and stops."""
        deadline = asyncio.get_running_loop().time() + drain_s
        self._trim.stop()
        # These calls would be waited for, which end with nothing else.
        self._service.end_registrations()
        self._devices.progress.end()
        await asyncio.gather(self.rpc.stop(drain_s), self._lane.stop(drain_s))
        await self._service.close(max(0.0, deadline - asyncio.get_running_loop().time()))
        await self.registry.close()
        await self._embedded.close()
        self._journal.close()
