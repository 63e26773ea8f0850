"""A device server as a running process."""

from __future__ import annotations

import socket
import zlib
from dataclasses import dataclass, field

from dsml_gpu.device.device import Device
from dsml_gpu.device.service import DeviceService, TransferSettings
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.backend import NUMPY, Backend
from dsml_gpu.wire.server import RpcServer
from dsml_gpu.wire.stubs import DEFAULT_MAX_MESSAGE_BYTES


@dataclass(frozen=True)
class DeviceConfig:
    """Everything a device server is started with.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        device_id: unique among the devices of a coordinator; None: made from host name and port, the same at every start.
        memory_bytes: size of device memory.
        min_addr: address of its first byte.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    device_id: int | None = None
    memory_bytes: int = 1 << 30
    min_addr: int = 0
    backend: Backend = NUMPY
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    transfers: TransferSettings = field(default_factory=TransferSettings)


class DeviceServer:
    """Starts and stops a device server. All calls come from one event loop."""

    def __init__(self, config: DeviceConfig) -> None:
        self.config = config
        self.rpc = RpcServer(config.host, config.port, config.max_message_bytes)

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
        arena = Arena(config.memory_bytes, config.backend, config.min_addr)
        self.device = Device(config.device_id or default_device_id(self.rpc.port), arena)
        self._service = DeviceService(self.rpc.address, config.transfers)
        self._service.add(self.device)
        await self.rpc.start({"GPUDevice": self._service}, config.transfers.stall_timeout_s)

    async def stop(self, drain_s: float = 10.0) -> None:
        """Drains and stops."""
        await self.rpc.stop(drain_s)
        await self._service.close()


def default_device_id(port: int) -> int:
    """The same for the same host and port at every start, and as good as never the same for two."""
    return zlib.crc32(f"{socket.gethostname()}:{port}".encode()) or 1
