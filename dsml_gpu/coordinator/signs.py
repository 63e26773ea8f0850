"""Signs of life of a device server behind a network: heartbeats over gRPC, its port, and its process where that is near."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path

import grpc

from dsml_gpu.coordinator.heartbeats import ProcessState
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.lane import Lane
from dsml_gpu.wire.status import error_of
from dsml_gpu.wire.stubs import device_stub

#: For an answer to a TCP connection.
_CONNECT_TIMEOUT_S = 1.0
#: A connection of its own, which no copy keeps busy.
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 1000)]


class RemoteSigns:
    """See `heartbeats.Signs`.

    Args:
        address: host:port of the server.
        lane: the lane to it, which there is on one host only.
    """

    def __init__(self, address: str, lane: Callable[[], Lane | None]) -> None:
        self._address = address
        self._lane = lane

    async def listen(self, interval_s: float) -> AsyncGenerator[pb.HeartbeatResponse, None]:
        async with grpc.aio.insecure_channel(self._address, _OPTIONS) as channel:
            call = device_stub(channel).Heartbeat(pb.HeartbeatRequest(intervalMs=max(1, round(interval_s * 1000))))
            try:
                async for beat in call:
                    yield beat
            except grpc.RpcError as failure:
                raise error_of(failure) from None
            finally:
                call.cancel()

    async def nobody_listens(self) -> bool:
        host, _, port = self._address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            places = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, ValueError):
            return False
        return bool(places) and all([await _is_refused(family, place) for family, _, _, _, place in places])

    def look(self) -> ProcessState | None:
        lane = self._lane()
        if lane is None or not lane.server_pid:
            return None
        try:
            return ProcessState.of_stat(Path(f"/proc/{lane.server_pid}/stat").read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            return ProcessState("X", 0)
        except (OSError, ValueError, IndexError):
            return None


async def _is_refused(family: int, place: tuple[object, ...]) -> bool:
    loop = asyncio.get_running_loop()
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        connecting = asyncio.ensure_future(loop.sock_connect(connection, place))
        await asyncio.wait([connecting], timeout=_CONNECT_TIMEOUT_S)
        if not connecting.done():
            connecting.cancel()
            with suppress(asyncio.CancelledError):
                await connecting
            return False
        return isinstance(connecting.exception(), ConnectionRefusedError)
