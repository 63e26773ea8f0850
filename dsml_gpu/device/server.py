"""A device server as a running process, with one or more devices."""

from __future__ import annotations

import asyncio
import re
import socket
import zlib
from dataclasses import dataclass, field

from dsml_gpu.device.device import Device
from dsml_gpu.device.registration import Registration
from dsml_gpu.device.service import DeviceService
from dsml_gpu.device.settings import TransferSettings
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.backend import NUMPY, Backend
from dsml_gpu.wire.lane import LaneServer
from dsml_gpu.wire.server import RpcServer
from dsml_gpu.wire.stubs import DEFAULT_MAX_MESSAGE_BYTES

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\s:\[\]]+):\d{1,5}")
#: Hosts that stand for all addresses of the machine.
_EVERYWHERE = ("", "0.0.0.0", "::", "[::]")


@dataclass(frozen=True)
class DeviceConfig:
    """Everything a device server is started with.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        device_id: of the first device, unique among the devices of a coordinator; the others have the ids that follow.
            None: all made from host name and port, the same at every start.
        memory_bytes: size of each device's memory.
        min_addr: address of its first byte.
        backends: where device memory is: one device for each, in this order. One may stand several times.
        coordinator: host:port of the one that it registers with; empty: none.
        advertised: host:port at which the coordinator and peers reach it; empty: where it listens, or where that is
            everywhere, the address from which it reaches the coordinator.
        has_lane: coordinators on this host call by a lane (`wire.lane`), not by TCP.

    Raises:
        ValueError: no backends, or ids outside 1 .. 2**64 - 1.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    device_id: int | None = None
    memory_bytes: int = 1 << 30
    min_addr: int = 0
    backends: tuple[Backend, ...] = (NUMPY,)
    coordinator: str = ""
    advertised: str = ""
    has_lane: bool = True
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    transfers: TransferSettings = field(default_factory=TransferSettings)

    def __post_init__(self) -> None:
        if not self.backends:
            raise ValueError("a device server needs at least one backend")
        if self.device_id is not None and not 1 <= self.device_id <= (1 << 64) - len(self.backends):
            raise ValueError(f"{len(self.backends)} device ids from {self.device_id} on are not all within 1 .. 2**64 - 1")
        for name, address in (("coordinator", self.coordinator), ("advertised", self.advertised)):
            if address and not _ADDRESS.fullmatch(address):
                raise ValueError(f"{name} is {address!r}, expected HOST:PORT")
        if self.advertised and not self.coordinator:
            raise ValueError("an address is advertised, but no coordinator is named")


class DeviceServer:
    """Starts and stops a device server. All calls come from one event loop.

    Attributes:
        devices: what it hosts, in the order of `DeviceConfig.backends`; empty before `start`.
    """

    def __init__(self, config: DeviceConfig) -> None:
        self.config = config
        self.rpc = RpcServer(config.host, config.port, config.max_message_bytes)
        self.devices: tuple[Device, ...] = ()
        self._registration: Registration | None = None
        self._lane: LaneServer | None = None

    @property
    def address(self) -> str:
        """host:port for coordinators and peers."""
        return self.rpc.address

    async def start(self) -> None:
        """Listens and serves.

        Raises:
            PortInUse: the address cannot be listened on.
        """
        config = self.config
        self.rpc.bind()
        self.devices = tuple(
            Device(
                default_device_id(self.rpc.port, position) if config.device_id is None else config.device_id + position,
                Arena(config.memory_bytes, backend, config.min_addr),
            )
            for position, backend in enumerate(config.backends)
        )
        self._service = DeviceService(self.rpc.address, config.transfers)
        for device in self.devices:
            self._service.add(device)
        if config.has_lane:
            self._lane = LaneServer(self._service)
            await self._lane.start()
            self._service.lane = self._lane.name
        await self.rpc.start({"GPUDevice": self._service}, config.transfers.stall_timeout_s)
        if config.coordinator:
            advertised = config.advertised or (None if config.host in _EVERYWHERE else self.rpc.address)
            self._registration = Registration(config.coordinator, advertised, self.rpc.port)
            self._registration.start()

    async def stop(self, drain_s: float = 10.0) -> None:
        """Leaves the coordinator, drains and stops, all within about `drain_s`."""
        deadline = asyncio.get_running_loop().time() + drain_s
        if self._registration is not None:
            await self._registration.leave(drain_s)
        self._service.progress.end()
        drain_s = max(0.0, deadline - asyncio.get_running_loop().time())
        stopping = [self.rpc.stop(drain_s)]
        if self._lane is not None:
            stopping.append(self._lane.stop(drain_s))
        await asyncio.gather(*stopping)
        await self._service.close()


def default_device_id(port: int, position: int = 0) -> int:
    """The same for the same host, port and position at every start, and as good as never the same for two.

    Args:
        position: of the device on its server; the first one's id is that of a server with no other.
    """
    name = f"{socket.gethostname()}:{port}" + (f":{position}" if position else "")
    return zlib.crc32(name.encode()) or 1
